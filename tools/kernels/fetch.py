"""Debian's kernels: the newest package of a series, unpacked to what a machine needs of it."""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

VIRTIO = ["virtio", "virtio_ring", "virtio_pci", "virtio_pci_modern_dev", "virtio_pci_legacy_dev"]
MODULES = frozenset([*VIRTIO, "9pnet", "9pnet_virtio", "9p", "netfs", "fscache", "overlay"])
"""Between the kernel and the host's files. Which of them a kernel has built in differs."""


class Missing(Exception):
    """Something that has to be installed or fetched first; the message says how."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: its package's name, its image, its modules (uncompressed)."""

    package: str
    image: Path
    modules: tuple[Path, ...]


def newest(names: Iterable[str], series: str) -> str | None:
    """Of the names of packages the newest one that holds a plain kernel of `series` for amd64."""
    pattern = re.compile(rf"linux-image-{re.escape(series)}\.\d+[0-9.+~a-z]*(-\d+)?-amd64")

    def version(name: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", name.removesuffix("-amd64"))]

    fitting = [name for name in names if pattern.fullmatch(name)]
    return max(fitting, key=version, default=None)


def kernel(series: str, store: Path) -> Kernel:
    """The kernel of a series ("6.1") from the folder `store`; fetched by apt if it is not there yet.

    Raises Missing if it cannot be had.
    """
    folder = store / series
    if not (folder / "package").exists():
        fetched = store / f"{series}.new"
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir(parents=True)
        package = _download(series, fetched)
        (fetched / "package").write_text(package)
        shutil.rmtree(folder, ignore_errors=True)
        fetched.rename(folder)
    return Kernel(
        (folder / "package").read_text(),
        folder / "vmlinuz",
        tuple(sorted((folder / "modules").glob("*.ko"))),
    )


def _download(series: str, into: Path) -> str:
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise Missing(
                f"{tool} is not there: the kernels are taken from Debian's packages. Elsewhere, put vmlinuz, "
                f"modules/*.ko and a file named package into {into.parent / series} yourself"
            )
    listed = subprocess.run(
        ["apt-cache", "pkgnames", f"linux-image-{series}."], capture_output=True, text=True, check=True
    )
    package = newest(listed.stdout.split(), series)
    if package is None:
        raise Missing(
            f"no package of Linux {series}: apt-get update, or add Debian 12 (6.1) and its backports (6.12) "
            "to the sources of apt"
        )
    with tempfile.TemporaryDirectory(dir=into) as folder:
        # Root would hand the download to a user who may not write here.
        fetched = subprocess.run(
            ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        archives = list(Path(folder).glob("*.deb"))
        if fetched.returncode != 0 or len(archives) != 1:
            raise Missing(f"apt-get download {package} failed (apt-get update?): {fetched.stderr.strip()}")
        unpacking = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archives[0]], stdout=subprocess.PIPE)
        assert unpacking.stdout is not None
        unpack(unpacking.stdout, into)
        if unpacking.wait() != 0:
            raise Missing(f"{archives[0].name} cannot be unpacked")
    return package


def unpack(archive: IO[bytes], into: Path) -> None:
    """Takes the image and the modules out of the tar file of a package."""
    (into / "modules").mkdir()
    with tarfile.open(fileobj=archive, mode="r|") as tar:
        for name, content in _wanted(tar):
            if name.startswith("vmlinuz"):
                (into / "vmlinuz").write_bytes(content)
            else:
                (into / "modules" / name).write_bytes(content)


def _wanted(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        path = PurePosixPath(member.name)
        stem, suffix = path.name.split(".ko", 1) if ".ko" in path.name else (path.name, "none")
        if not member.isfile():
            continue
        if stem.startswith("vmlinuz-") or (suffix != "none" and stem in MODULES):
            file = tar.extractfile(member)
            assert file is not None
            content = file.read()
            if suffix == ".xz":
                content = lzma.decompress(content)
            elif suffix not in ("", "none"):
                raise Missing(f"{path.name}: modules packed by other means than xz are not known here")
            yield (stem if suffix == "none" else f"{stem}.ko"), content
