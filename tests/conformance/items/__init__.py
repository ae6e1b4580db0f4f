"""The items, one module for each of the kernel's test groups."""

MODULES = (
    "handshake",
    "registering",
    "zeropage",
    "moving",
    "wp_fork",
    "wp_unpopulated",
    "minor",
    "sigbus",
    "events",
    "poison",
    "mmap_changing",
    "stress",
    "wp_mremap",
    "others",
)
