"""One command under one kernel, in QEMU."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .fetch import Kernel, Missing
from .image import image

QEMU = "qemu-system-x86_64"


@dataclass(frozen=True)
class Machine:
    """What a machine is made of: processors, MiB of memory, pages of 2 MiB in its pool, and its speed."""

    processors: int = 2
    memory: int = 2048
    huge_pages: int = 64
    accelerated: bool = False


@dataclass(frozen=True)
class Ended:
    """How a machine ended: the command's status (128 + n: by signal n), or None and what the console said."""

    status: int | None
    console: str


def lacking() -> list[str]:
    """What has to be installed before a machine can start, each with the command."""
    missing = []
    if shutil.which(QEMU) is None:
        missing.append(f"{QEMU} is not installed: apt-get install --no-install-recommends qemu-system-x86")
    if shutil.which("cc") is None:
        missing.append("there is no C compiler (cc): apt-get install gcc libc6-dev")
    return missing


def command_line(machine: Machine, kernel: Path, initrd: Path, job: Path) -> list[str]:
    """How QEMU is started."""
    if machine.accelerated:
        speed = ["-accel", "kvm", "-cpu", "host"]
    else:
        # la57: five levels of page tables are only slower to walk.
        speed = ["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]
    shared = "security_model=none,multidevs=remap"
    words = [
        "console=ttyS0",
        "loglevel=4",
        "panic=-1",
        "mitigations=off",
        "nokaslr",
        "audit=0",
        # QEMU 7.2 breaks the flags when an interrupt follows cmpxchg16b, and 6.12 then panics. NumPy wants a
        # processor that has the instruction; the kernel can do without.
        "clearcpuid=cx16",
        f"hugepages={machine.huge_pages}",
        "transparent_hugepage=madvise",
    ]
    return [
        QEMU,
        *["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"],
        *speed,
        *["-smp", str(machine.processors), "-m", str(machine.memory)],
        *["-kernel", str(kernel), "-initrd", str(initrd), "-append", " ".join(words)],
        *["-virtfs", f"local,path=/,mount_tag=machine,readonly=on,{shared}"],
        *["-virtfs", f"local,path={job},mount_tag=job,{shared}"],
        *["-serial", f"file:{job / 'console'}"],
        *["-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out"],
    ]


def _strings(words: Sequence[str]) -> bytes:
    return b"".join(word.encode() + b"\0" for word in words)


def run(
    machine: Machine,
    kernel: Kernel,
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    seconds: float,
    job: Path,
    prefix: str = "",
) -> Ended:
    """Boots `kernel`, runs `command` in `folder` there, and prints its output line by line behind `prefix`.

    `job` is a folder of the host that the command sees as /run/job and may write to. Raises Missing if QEMU
    is not there, and TimeoutError, with the console, after `seconds`.
    """
    if missing := lacking():
        raise Missing("; ".join(missing))
    modules = {path.stem: path.read_bytes() for path in kernel.modules}
    (job / "initrd").write_bytes(image(modules, kernel.image.parent))
    (job / "argv").write_bytes(_strings(command))
    (job / "environment").write_bytes(_strings([f"{key}={value}" for key, value in environment.items()]))
    (job / "folder").write_bytes(_strings([str(folder)]))
    (job / "status").unlink(missing_ok=True)
    late = threading.Event()
    with subprocess.Popen(
        command_line(machine, kernel.image, job / "initrd", job),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as qemu:

        def end() -> None:
            late.set()
            qemu.kill()

        clock = threading.Timer(seconds, end)
        clock.start()
        try:
            assert qemu.stdout is not None
            for line in qemu.stdout:
                print(prefix + line.decode(errors="replace").rstrip("\r\n"), flush=True)
        finally:
            clock.cancel()
            qemu.kill()
    console = (job / "console").read_text(errors="replace") if (job / "console").exists() else ""
    if late.is_set():
        raise TimeoutError(f"not ended after {seconds:.0f} s; its console:\n{console[-3000:]}")
    status = (job / "status").read_text().strip() if (job / "status").exists() else ""
    return Ended(int(status) if status.isdigit() else None, console)


def job_folder() -> tempfile.TemporaryDirectory[str]:
    """A fresh folder for `run`."""
    return tempfile.TemporaryDirectory(prefix="userfault-kernels-")
