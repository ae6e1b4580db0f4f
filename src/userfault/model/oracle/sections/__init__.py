"""One module for each source of the probe. A scenario holds steps, never expected values.

A section is a function `run(probe, name, parts)`: `name` is the first word of the row's id, `parts` the
others. It raises Unsupported for a case it does not know.
"""


class Unsupported(Exception):
    """There is no scenario for this case."""
