"""The runner for older kernels, as far as it can be tested without a machine."""

from __future__ import annotations

import io
import lzma
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tools.kernels import fetch, image, machine, suite


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ("6.1", "linux-image-6.1.0-56-amd64"),
        ("6.12", "linux-image-6.12.117+deb12-amd64"),
        ("6.6", None),
    ],
)
def test_the_newest_plain_kernel_of_a_series_is_taken(series: str, expected: str | None) -> None:
    names = [
        "linux-image-6.1.0-9-amd64",
        "linux-image-6.1.0-56-amd64",
        "linux-image-6.1.0-56-amd64-dbg",
        "linux-image-6.1.0-56-amd64-unsigned",
        "linux-image-6.1.0-57-cloud-amd64",
        "linux-image-6.1.0-57-rt-amd64",
        "linux-image-6.12.9+deb12-amd64",
        "linux-image-6.12.117+deb12-amd64",
        "linux-image-6.12.118+deb12-arm64",
    ]
    assert fetch.newest(names, series) == expected


def module(name: str, *needs: str) -> bytes:
    return b"\x7fELF\0name=" + name.encode() + b"\0depends=" + ",".join(needs).encode() + b"\0"


def test_a_package_is_unpacked_to_its_image_and_the_modules_that_a_machine_needs(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path, content in (
            ("./boot/vmlinuz-6.12.117+deb12-amd64", b"kernel"),
            ("./boot/config-6.12.117+deb12-amd64", b"no"),
            ("./lib/modules/x/kernel/fs/9p/9p.ko.xz", lzma.compress(module("9p", "9pnet"))),
            ("./lib/modules/x/kernel/net/9p/9pnet.ko", module("9pnet")),
            ("./lib/modules/x/kernel/fs/ext4/ext4.ko.xz", b"no"),
        ):
            about = tarfile.TarInfo(path)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    packed.seek(0)
    fetch.unpack(packed, tmp_path)
    assert (tmp_path / "vmlinuz").read_bytes() == b"kernel"
    found = {path.name: path.read_bytes() for path in (tmp_path / "modules").iterdir()}
    assert found == {"9p.ko": module("9p", "9pnet"), "9pnet.ko": module("9pnet")}


def test_a_kernel_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "6.1" / "modules").mkdir(parents=True)
    (tmp_path / "6.1" / "modules" / "9p.ko").write_bytes(b"")
    (tmp_path / "6.1" / "package").write_text("linux-image-6.1.0-1-amd64")
    kernel = fetch.kernel("6.1", tmp_path)
    assert kernel.package == "linux-image-6.1.0-1-amd64"
    assert [path.name for path in kernel.modules] == ["9p.ko"]


def test_modules_are_loaded_after_those_that_they_need() -> None:
    modules = {
        "9p": module("9p", "netfs", "9pnet"),
        "9pnet_virtio": module("9pnet_virtio", "9pnet", "virtio_ring"),
        "9pnet": module("9pnet"),
        "virtio_ring": module("virtio_ring", "virtio"),
        "virtio": module("virtio"),
    }
    order = image.in_order(modules)
    assert sorted(order) == sorted(modules.values())
    for name, content in modules.items():
        for needed in image.needs(content):
            # What is not there is built into the kernel.
            if needed in modules:
                assert order.index(modules[needed]) < order.index(modules[name])


def entries(packed: bytes) -> dict[str, tuple[int, bytes]]:
    """What is in a cpio archive of the "new ASCII" kind, read by its description."""
    found, at = {}, 0
    while True:
        assert packed[at : at + 6] == b"070701"
        fields = [int(packed[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = packed[at + 110 : at + 110 + name_size - 1].decode()
        begin = at + (110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, packed[begin : begin + size])
        at = begin + (size + 3) // 4 * 4


def test_what_is_packed_is_in_the_archive() -> None:
    files = {"dev": (0o040755, b""), "init": (0o100755, b"program"), "x": (0o100644, b"12345")}
    assert entries(image.archive(files)) == files


def test_the_first_process_is_a_static_program(tmp_path: Path) -> None:
    try:
        packed = image.image({"9pnet": module("9pnet")}, tmp_path)
    except fetch.Missing as missing:
        pytest.skip(str(missing))
    assert entries(packed)["modules/00"][1] == module("9pnet")
    program = (tmp_path / "init").read_bytes()
    assert program[:4] == b"\x7fELF"
    # No segment asks for an interpreter.
    offset, size, count = struct.unpack_from("<32xQ14xHH", program)
    kinds = {struct.unpack_from("<I", program, offset + number * size)[0] for number in range(count)}
    assert 3 not in kinds


def test_the_machine_sees_our_files_and_may_not_change_them() -> None:
    words = machine.command_line(machine.Machine(huge_pages=7), Path("/k"), Path("/i"), Path("/job"))
    shares = [word for word in words if word.startswith("local,")]
    assert [("readonly=on" in share, share.split(",")[1]) for share in shares] == [
        (True, "path=/"),
        (False, "path=/job"),
    ]
    assert "hugepages=7" in words[words.index("-append") + 1].split()


REPORT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"><skipped/></testcase><testcase name="c"><failure/></testcase>
<testcase name="d"><error/></testcase><testcase name="e"><properties/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted() -> None:
    assert suite.counted(REPORT) == suite.Counts(passed=2, skipped=1, failed=2)


def test_the_results_of_rust_are_counted() -> None:
    output = """
running 4 tests
test one ... ok
test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 5 filtered out; finished in 0.01s
"""
    assert suite.summed(output) == suite.Counts(passed=5, skipped=1, failed=1)


def content(**steps: int) -> bytes:
    """A file of four pages, each of which holds its step."""
    return b"".join(struct.pack("<Q", steps.get(f"page{number}", 0)) * 512 for number in range(4))


def test_a_file_after_a_kill_is_judged() -> None:
    assert suite.judged(content(page1=3, page2=4), 4) == ""
    assert suite.judged(content(page1=3, page2=5), 4) == ""
    assert "step 4 was flushed, the newest in the file is 3" in suite.judged(content(page1=3), 4)
    assert "the newest in the file is 6" in suite.judged(content(page1=6), 4)
    torn = bytearray(content(page1=3, page2=4))
    torn[4096:4104] = struct.pack("<Q", 4)
    assert suite.judged(bytes(torn), 4) == "pages [1] are torn"


def test_a_kernel_that_does_not_note_writes_is_said_to_refuse_inline_ones() -> None:
    command = "from tools.kernels import suite; print(suite.inline_writes_are_refused())"
    said = subprocess.run(
        [sys.executable, "-c", command],
        cwd=suite.ROOT,
        env={**os.environ, "USERFAULT_WITHOUT": "wp_async"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "needs a kernel that notes writes by itself" in said
