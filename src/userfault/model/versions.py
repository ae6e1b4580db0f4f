"""Which kernel is modelled. What a version lacks or does otherwise stands beside the rule it changes, as
`kernel.version >= (6, 6)`; this file only knows how a version is written, and what UFFDIO_API offers."""

from __future__ import annotations

from typing import Final

from userfault import abi

PROFILES: Final = ("5.17", "6.1", "6.12", "6.18")
"""The profiles: 5.17 from the commit log of that time, the others measured."""

_FEATURES: Final = (
    ((4, 11), 0x7F & ~abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP),
    ((4, 14), abi.UFFD_FEATURE_SIGBUS | abi.UFFD_FEATURE_THREAD_ID),
    ((5, 7), abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP),
    ((5, 13), abi.UFFD_FEATURE_MINOR_HUGETLBFS),
    ((5, 14), abi.UFFD_FEATURE_MINOR_SHMEM),
    ((5, 18), abi.UFFD_FEATURE_EXACT_ADDRESS),
    ((5, 19), abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM),
    ((6, 4), abi.UFFD_FEATURE_WP_UNPOPULATED),
    ((6, 6), abi.UFFD_FEATURE_POISON),
    ((6, 7), abi.UFFD_FEATURE_WP_ASYNC),
    ((6, 8), abi.UFFD_FEATURE_MOVE),
)


def parse_version(text: str) -> tuple[int, int]:
    """'6.18' as (6, 18). Raises ValueError for what is no version, or one before 5.7 (no
    write-protection)."""
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit()) or (int(major), int(minor)) < (5, 7):
        raise ValueError(f"{text!r} is no kernel version from 5.7 on, such as {', '.join(PROFILES)}")
    return int(major), int(minor)


def features(version: tuple[int, int]) -> int:
    """The feature bits that UFFDIO_API offers (UFFD_API_FEATURES)."""
    mask = 0
    for since, bits in _FEATURES:
        if version >= since:
            mask |= bits
    return mask
