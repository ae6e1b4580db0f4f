"""Linux's errno numbers, the same on every platform that runs the model."""

from typing import Final

EPERM: Final = 1
ENOENT: Final = 2
ESRCH: Final = 3
EINTR: Final = 4
EIO: Final = 5
EBADF: Final = 9
EAGAIN: Final = 11
ENOMEM: Final = 12
EACCES: Final = 13
EFAULT: Final = 14
EBUSY: Final = 16
EEXIST: Final = 17
ENODEV: Final = 19
EINVAL: Final = 22
EMFILE: Final = 24
ENOTTY: Final = 25
ESPIPE: Final = 29
ENOSYS: Final = 38
EOPNOTSUPP: Final = 95
ETIMEDOUT: Final = 110
EHWPOISON: Final = 133

_NAMES: Final = {
    value: name for name, value in list(globals().items()) if name.startswith("E") and name.isupper()
}


def errno_name(number: int) -> str:
    """'ok' for 0, else the name of the errno."""
    return "ok" if number == 0 else _NAMES.get(number, f"errno {number}")


class SystemCallError(Exception):
    """A system call failed with `errno`."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno_name(errno))
        self.errno = errno
