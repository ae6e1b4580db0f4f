"""Getting a userfaultfd on machines that allow more or less."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conftest import RunChild

pytest.importorskip("userfault._native", reason="the compiled part is not built")

PREAMBLE = """
import ctypes, errno, os, platform, struct
from userfault import Userfaultfd, abi
import userfault.userfaultfd

def drop():
    os.setgroups([]); os.setgid(65534); os.setuid(65534)

def forbid(with_errno):
    number = {"x86_64": 323, "aarch64": 282}[platform.machine()]
    # Load the number; if it is userfaultfd's, return the errno; else allow.
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50000 | with_errno), (6, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.c_char_p(arguments)) == 0

def refusal(*features, **options):
    try:
        Userfaultfd(*features, **options)
    except OSError as error:
        return error
    raise SystemExit("it was not refused")
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without privileges")
needs_restriction = pytest.mark.skipif(
    Path("/proc/sys/vm/unprivileged_userfaultfd").exists()
    and Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0",
    reason="vm.unprivileged_userfaultfd allows everybody everything here",
)
needs_device = pytest.mark.skipif(
    not os.access("/dev/userfaultfd", os.R_OK), reason="/dev/userfaultfd is not open to this user"
)


@needs_root
@needs_restriction
def test_without_privileges_user_mode_is_what_one_gets(run_child: RunChild) -> None:
    run_child(
        PREAMBLE
        + """
drop()
with Userfaultfd() as uffd:
    assert not uffd.kernel_faults and uffd.way == "syscall"
with Userfaultfd(kernel_faults=False) as uffd:
    assert not uffd.kernel_faults
"""
    )


@needs_root
@needs_restriction
def test_a_refusal_names_all_that_was_tried_and_the_cure(run_child: RunChild) -> None:
    run_child(
        PREAMBLE
        + """
drop()
error = refusal(kernel_faults=True)
assert error.errno in (errno.EPERM, errno.EACCES), error
for part in ("system call userfaultfd(2): Operation not permitted", "/dev/userfaultfd: Permission denied",
             "--device /dev/userfaultfd", "sysctl vm.unprivileged_userfaultfd=1", "CAP_SYS_PTRACE"):
    assert part in str(error), (part, str(error))
error = refusal(kernel_faults=True, way="syscall")
assert "/dev/userfaultfd: " not in str(error), error
"""
    )


@needs_root
@needs_restriction
def test_fork_events_are_left_out_when_preferred_and_explained_when_required(run_child: RunChild) -> None:
    run_child(
        PREAMBLE
        + """
drop()
fork, unmap = abi.UFFD_FEATURE_EVENT_FORK, abi.UFFD_FEATURE_EVENT_UNMAP
with Userfaultfd(unmap, prefer=fork | 1 << 60) as uffd:
    assert uffd.features == unmap
error = refusal(fork)
assert error.errno == errno.EPERM and "CAP_SYS_PTRACE" in str(error), error
"""
    )


@needs_device
def test_where_a_filter_forbids_the_system_call_the_device_is_taken(run_child: RunChild) -> None:
    run_child(
        PREAMBLE
        + """
forbid(errno.EPERM)
with Userfaultfd() as uffd:
    assert uffd.way == "device" and uffd.kernel_faults
with Userfaultfd(kernel_faults=False) as uffd:
    assert uffd.way == "device" and not uffd.kernel_faults
assert userfault.userfaultfd.offered_features() & 1
"""
    )


@needs_root
@pytest.mark.parametrize("number", ["EPERM", "ENOSYS"])
def test_where_a_filter_forbids_everything_the_error_says_so(number: str, run_child: RunChild) -> None:
    run_child(
        PREAMBLE
        + f"""
drop()
forbid(errno.{number})
error = refusal()
assert "seccomp" in str(error) and "--device /dev/userfaultfd" in str(error), error
assert str(error).count("userfaultfd(2)") == 3, error
assert str(error).count("UFFD_USER_MODE_ONLY") == 2, error
"""
    )


def test_too_many_open_files_are_not_taken_for_a_missing_privilege(run_child: RunChild) -> None:
    run_child(
        PREAMBLE
        + """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
error = refusal()
assert error.errno == errno.EMFILE and "ulimit" in str(error), error
"""
    )


def test_one_way_can_be_forced() -> None:
    from userfault import Userfaultfd

    with Userfaultfd(way="syscall") as uffd:
        assert uffd.way == "syscall"
    with pytest.raises(ValueError, match="'syscall', 'device' or None"):
        Userfaultfd(way="magic")  # type: ignore[arg-type]
