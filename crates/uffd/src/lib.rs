//! The kernel interface: ABI structs, ioctls, messages, PAGEMAP_SCAN. No threads, no policy.
