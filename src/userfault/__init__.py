"""User-space paging for Python, on Linux userfaultfd."""
