"""A process with memory that its test serves: it does what it is told, each order on a thread of its own.

Orders come as lines of JSON on stdin, answers go as lines of JSON to stdout. Memory is touched by functions
of the C library, which ctypes calls without the interpreter lock: a thread that waits for a page stops no
other.

usage: python guest.py SOCKET KIND PAGES FEATURES MODE [PAGE_SIZE]
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import sys
import threading
from typing import Any

from userfault.serving import LayoutItem, send
from userfault.userfaultfd import Userfaultfd

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
number, place, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
libc.mmap.argtypes = [place, size, number, number, number, ctypes.c_long]
libc.mremap.argtypes = [place, size, size, number, place]
libc.memcpy.argtypes = [place, place, size]
libc.madvise.argtypes = [place, size, number]
libc.munmap.argtypes = [place, size]
libc.write.argtypes = [number, place, size]

MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2


def checked(result: int | None) -> int:
    if result is None or result in (-1, 2**64 - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Guest:
    def __init__(self, kind: str, pages: int, page: int, features: int, mode: int) -> None:
        self.page = page
        self.length = pages * page
        flags, fd = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1
        if kind != "anon":
            fd = os.memfd_create("guest", os.MFD_HUGETLB if kind == "hugetlb" else 0)
            os.ftruncate(fd, self.length)
            flags = mmap.MAP_SHARED
        rights = mmap.PROT_READ | mmap.PROT_WRITE
        self.start = checked(libc.mmap(None, self.length, rights, flags, fd, 0))
        self.uffd = Userfaultfd(features)
        self.uffd.register(self.start, self.length, mode).check()
        self.children: dict[int, tuple[int, int]] = {}

    def hand_over(self, connection: socket.socket) -> None:
        send(connection, self.uffd, [LayoutItem(self.start, self.length, 0, self.page)])

    def read(self, at: int, length: int = 8) -> str:
        data = ctypes.create_string_buffer(length)
        libc.memcpy(data, self.start + at, length)
        return data.raw.hex()

    def store(self, at: int, data: str) -> None:
        libc.memcpy(self.start + at, bytes.fromhex(data), len(data) // 2)

    def write(self, at: int, length: int) -> int:
        """A system call that reads the memory: bytes, or -errno."""
        reader, writer = os.pipe()
        done: int = libc.write(writer, self.start + at, length)
        os.close(reader)
        os.close(writer)
        return done if done >= 0 else -ctypes.get_errno()

    def madvise(self, at: int, length: int, advice: int) -> None:
        checked(libc.madvise(self.start + at, length, advice))

    def munmap(self, at: int, length: int) -> None:
        checked(libc.munmap(self.start + at, length))

    def move(self, at: int, length: int, new_length: int) -> int:
        """Moves a part of the memory; answers where to, as an offset from the start."""
        rights, flags = 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        place = checked(libc.mmap(None, new_length, rights, flags, -1, 0))
        how = MREMAP_MAYMOVE | MREMAP_FIXED
        return checked(libc.mremap(self.start + at, length, new_length, how, place)) - self.start

    def fork(self, at: int, length: int = 8) -> int:
        """Forks a child that reads when it is told; answers its number."""
        reader, writer = os.pipe()
        go, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.read(go, 1)
            os.write(writer, self.read(at, length).encode())
            os._exit(0)
        os.close(writer)
        os.close(go)
        self.children[pid] = (tell, reader)
        return pid

    def child_reads(self, child: int) -> str:
        """What the child reads now."""
        tell, reader = self.children.pop(child)
        os.write(tell, b"x")
        with os.fdopen(reader) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        os.close(tell)
        return text

    def again(self, connection: socket.socket) -> None:
        self.hand_over(connection)

    def give_up_copy(self) -> None:
        self.uffd.close()


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    kind, pages, features, mode = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    page = int(sys.argv[6]) if len(sys.argv) > 6 else mmap.PAGESIZE
    guest = Guest(kind, pages, page, features, mode)
    guest.hand_over(connection)
    lock = threading.Lock()

    def obey(order: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"id": order["id"]}
        try:
            if order["do"] == "again":
                guest.again(connection)
            else:
                answer["result"] = getattr(guest, order["do"])(**order["with"])
        except OSError as error:
            answer["errno"] = error.errno
        with lock:
            print(json.dumps(answer), flush=True)

    for line in sys.stdin:
        threading.Thread(target=obey, args=[json.loads(line)], daemon=True).start()
    os._exit(0)


main()
