"""Takes a huge page from a tmpfs mounted in a namespace of this process, and prints how far it came.

Run as a script in a process of its own (``python -I -S``): unsharing a user namespace cannot be undone, and
works only in a process with one thread. The mount is seen by nobody else and goes away with the process.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import re
import tempfile

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
HUGE = 2 << 20

libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """A step that failed, with its errno."""


def check(step: str, result: int) -> None:
    if result != 0:
        raise Failed(step, ctypes.get_errno())


def enter_namespace() -> bool:
    """Enters a mount namespace; returns True if that took a user namespace."""
    if libc.unshare(CLONE_NEWNS) == 0:
        return False
    uid, gid = os.getuid(), os.getgid()
    check("unshare", libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            raise Failed(f"the map of users and groups ({name})", error.errno) from None
    return True


def take_huge_page(folder: str) -> None:
    check("private mounts", libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    options = f"huge=always,size={4 * HUGE}".encode()
    check("mount", libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, options))
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(fd, 2 * HUGE)
    os.pwrite(fd, b"x" * HUGE, 0)
    with mmap.mmap(fd, 2 * HUGE) as memory:
        memory[0] = 1
        with open("/proc/self/smaps") as smaps:
            huge = sum(int(kib) for kib in re.findall(r"^ShmemPmdMapped:\s*(\d+) kB", smaps.read(), re.M))
    if huge * 1024 < HUGE:
        raise Failed("a huge page", errno.ENOMEM)


def main() -> None:
    answer = {"failed": "", "errno": 0, "by_user_namespace": os.geteuid() != 0}
    folder = tempfile.mkdtemp(prefix="userfault-doctor-")
    try:
        answer["by_user_namespace"] = enter_namespace()
        take_huge_page(folder)
    except Failed as failed:
        answer["failed"], answer["errno"] = failed.args
    except OSError as error:
        answer["failed"], answer["errno"] = "a file on the tmpfs", error.errno
    finally:
        libc.umount2(folder.encode(), 2)
        os.rmdir(folder)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
