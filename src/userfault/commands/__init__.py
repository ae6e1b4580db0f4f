"""The sub-commands of ``userfault`` that are groups of their own, one file each."""
