"""Tests under older kernels: `make kernels`, or `python -m tools.kernels`.

The library chooses by feature what an older kernel has to do without, and tests force each choice on the
running kernel. That shows that the choices are sound, and not that an older kernel behaves as we believe. So
Debian's kernels are booted in QEMU, with this machine's files, and the tests that ask the kernel run there.

    fetch     a kernel and its modules, out of a Debian package (nothing is installed)
    image     the first files of a machine: modules in their order, and init.c, its first process
    machine   QEMU: one command under one kernel, its output and its status
    suite     what is run in each, and how the counts come back

What a command sees: the host's files, read-only and under a layer of memory, so it may write anywhere and
nothing stays but what it writes in /run/job; the same folder and environment; no network but a loopback.
The machine is emulated, and slow: the time limits of the tests are multiplied (USERFAULT_TIME_SCALE). With
--kvm it is as fast as this one, where /dev/kvm works.
"""
