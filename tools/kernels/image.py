"""The first files of a machine, as the kernel unpacks them: modules in the order they load, and /init."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .fetch import Missing

INIT = Path(__file__).with_name("init.c")


def needs(module: bytes) -> list[str]:
    """The modules that a module names as the ones to be loaded before it."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []


def in_order(modules: Mapping[str, bytes]) -> list[bytes]:
    """The modules, each after those that it needs. What is not among them is built into the kernel."""
    known = {name.replace("-", "_"): module for name, module in modules.items()}
    ordered: list[str] = []

    def place(name: str) -> None:
        if name in known and name not in ordered:
            for other in needs(known[name]):
                place(other)
            ordered.append(name)

    for name in sorted(known):
        place(name)
    return [known[name] for name in ordered]


def archive(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive of the kind that Linux unpacks at boot: path to (mode, content)."""

    def entry(number: int, path: str, mode: int, content: bytes) -> bytes:
        name = path.encode() + b"\0"
        fields = [number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0]
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        return _padded(head) + _padded(content)

    packed = b"".join(
        entry(number, path, mode, content) for number, (path, (mode, content)) in enumerate(files.items(), 1)
    )
    return packed + entry(0, "TRAILER!!!", 0, b"")


def _padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % 4)


def image(modules: Mapping[str, bytes], folder: Path) -> bytes:
    """The archive for a kernel with these modules. /init is compiled in `folder`, once."""
    folder_of = (stat.S_IFDIR | 0o755, b"")
    console = (stat.S_IFREG | 0o755, _init(folder).read_bytes())
    files = {"dev": folder_of, "modules": folder_of, "init": console}
    for number, module in enumerate(in_order(modules)):
        files[f"modules/{number:02}"] = (stat.S_IFREG | 0o644, module)
    return archive(files)


def _init(folder: Path) -> Path:
    if shutil.which("cc") is None:
        raise Missing("there is no C compiler (cc): apt-get install gcc libc6-dev")
    binary = folder / "init"
    if not binary.exists() or binary.stat().st_mtime < INIT.stat().st_mtime:
        done = subprocess.run(
            ["cc", "-O2", "-static", "-o", binary, INIT], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise Missing(f"init.c does not compile (apt-get install libc6-dev): {done.stderr.strip()}")
    return binary
