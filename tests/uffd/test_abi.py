"""Numbers, sizes and offsets of `userfault.abi`, against the Rust side and the machine's kernel header."""

from __future__ import annotations

import ctypes
import errno
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from userfault import abi

CONSTANT = re.compile(r"^(_?UFFD|PAGE_IS_|PM_|PAGEMAP_SCAN|USERFAULTFD_)")


def constants() -> dict[str, int]:
    return {n: v for n, v in vars(abi).items() if CONSTANT.match(n) and isinstance(v, int)}


def fields(
    struct: type[ctypes.Structure | ctypes.Union], at: int = 0, path: str = ""
) -> Iterator[tuple[str, int, int]]:
    """Every field with its offset and size, nested ones by their C path."""
    for name, kind in struct._fields_:  # type: ignore[misc]
        offset = at + getattr(struct, name).offset
        yield path + name, offset, ctypes.sizeof(kind)
        if isinstance(kind, type) and issubclass(kind, ctypes.Structure | ctypes.Union):
            yield from fields(kind, offset, f"{path}{name}.")


def structs() -> dict[str, type[ctypes.Structure | ctypes.Union]]:
    return {
        name: value
        for name, value in vars(abi).items()
        if isinstance(value, type) and issubclass(value, ctypes.Structure | ctypes.Union)
    }


def python_table() -> dict[str, int]:
    table = constants()
    for name, struct in structs().items():
        table[f"sizeof {name}"] = ctypes.sizeof(struct)
        for path, offset, size in fields(struct):
            table[f"offsetof {name}.{path}"] = offset
            table[f"sizeof {name}.{path}"] = size
    return table


def test_every_entry_of_the_rust_side_is_the_same_in_python() -> None:
    native = pytest.importorskip("userfault._native", reason="the compiled part is not built")
    rust = dict(native.abi_table())
    python = python_table()
    assert {name: value for name, value in rust.items() if python.get(name) != value} == {}
    assert len(rust) > 150


def test_every_constant_and_struct_of_python_is_on_the_rust_side() -> None:
    native = pytest.importorskip("userfault._native", reason="the compiled part is not built")
    rust = {name for name, _ in native.abi_table()}
    assert set(constants()) - rust == set()
    # The parts of a message have names of their own on one side only; their fields are compared by path.
    parts = {name for name in structs() if name.startswith("uffd_msg_")}
    assert {f"sizeof {name}" for name in set(structs()) - parts} - rust == set()
    message = {f"offsetof uffd_msg.{path}" for path, _, _ in fields(abi.uffd_msg)}
    leaves = {name for name in message if re.search(r"(flags|address|ptid|ufd|from|to|len|start|end)$", name)}
    assert leaves - rust == set()


GUARDS = {
    "uffdio_continue": "UFFDIO_CONTINUE",
    "uffdio_poison": "UFFDIO_POISON",
    "uffdio_move": "UFFDIO_MOVE",
    "pm_scan_arg": "PAGEMAP_SCAN",
    "page_region": "PAGEMAP_SCAN",
}
"""The macro that came into the header together with a struct: without it, the struct is not there."""


def question(name: str) -> str:
    """C code that prints `name=value` if the header has the name."""
    kind, _, path = name.partition(" ")
    struct, _, field = path.partition(".")
    if not path:
        guard, value = name, name
    elif not field:
        guard, value = GUARDS.get(struct, "UFFDIO_API"), f"sizeof(struct {struct})"
    elif kind == "offsetof":
        guard, value = GUARDS.get(struct, "UFFDIO_API"), f"offsetof(struct {struct}, {field})"
    else:
        guard, value = GUARDS.get(struct, "UFFDIO_API"), f"sizeof(((struct {struct} *)0)->{field})"
    return f'#ifdef {guard}\nprintf("{name}=%llu\\n", (unsigned long long)({value}));\n#endif'


def header_values(names: list[str], folder: Path) -> dict[str, int]:
    """What the machine's kernel header says, for the names that it has."""
    source, binary = folder / "header.c", folder / "header"
    includes = ["stdio.h", "stddef.h", "sys/ioctl.h", "linux/types.h", "linux/userfaultfd.h", "linux/fs.h"]
    lines = [f"#include <{include}>" for include in includes]
    lines += ["int main(void) {", *map(question, names), "return 0; }"]
    source.write_text("\n".join(lines))
    built = subprocess.run(["cc", "-w", "-o", binary, source], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    printed = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, _, value in (line.partition("=") for line in printed.splitlines())}


def test_every_name_that_the_machines_kernel_header_has_is_the_same(
    tmp_path: Path, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) to read the header with: apt install gcc")
    if not Path("/usr/include/linux/userfaultfd.h").exists():
        pytest.skip("no kernel header: apt install linux-libc-dev")
    ours = python_table()
    # The header has no names for the parts of a message; their fields are compared by their path.
    names = sorted(name for name in ours if not re.match(r"\w+ uffd_msg_", name))
    theirs = header_values(names, tmp_path)
    lacking = sorted(set(names) - set(theirs))
    record_property("compared", len(theirs))
    record_property("missing in the header", len(lacking))
    with capsys.disabled():
        print(f"\nkernel header: {len(theirs)} names compared, {len(lacking)} not in it ", end="")
    assert {name: (ours[name], value) for name, value in theirs.items() if ours[name] != value} == {}
    # The oldest header with minor faults on shared memory has this many; fewer means a broken question.
    assert len(theirs) >= 100


def test_an_unread_message_of_every_kind_is_parsed_with_every_field() -> None:
    raw = abi.uffd_msg(event=abi.UFFD_EVENT_PAGEFAULT)
    raw.arg.pagefault.flags, raw.arg.pagefault.address, raw.arg.pagefault.feat.ptid = 3, 0x7000, 99
    remap = abi.uffd_msg(event=abi.UFFD_EVENT_REMAP)
    setattr(remap.arg.remap, "from", 1)
    remap.arg.remap.to, remap.arg.remap.len = 2, 3
    fork = abi.uffd_msg(event=abi.UFFD_EVENT_FORK)
    fork.arg.fork.ufd = 7
    remove = abi.uffd_msg(event=abi.UFFD_EVENT_REMOVE)
    remove.arg.remove.start, remove.arg.remove.end = 4, 5
    unmap = abi.uffd_msg(event=abi.UFFD_EVENT_UNMAP)
    unmap.arg.remove.start, unmap.arg.remove.end = 6, 8
    later = abi.uffd_msg(event=0x17)
    later.arg.reserved.reserved3 = 11
    data = b"".join(bytes(message) for message in (raw, remap, fork, remove, unmap, later))
    assert list(abi.parse_messages(data)) == [
        abi.Pagefault(3, 0x7000, 99),
        abi.Remap(1, 2, 3),
        abi.Fork(7),
        abi.Remove(4, 5),
        abi.Unmap(6, 8),
        abi.UnknownEvent(0x17, (0, 0, 11)),
    ]


def test_half_a_message_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole number of messages"):
        list(abi.parse_messages(bytes(33)))


def test_the_file_needs_nothing_but_the_standard_library() -> None:
    program = (
        "import sys, importlib.util;"
        f"spec = importlib.util.spec_from_file_location('abi', {abi.__file__!r});"
        "module = importlib.util.module_from_spec(spec); sys.modules['abi'] = module;"
        "spec.loader.exec_module(module);"
        "assert not [m for m in sys.modules if m.startswith(('userfault', 'numpy'))]"
    )
    subprocess.run([sys.executable, "-S", "-c", program], check=True)


def test_features_are_named_and_unknown_bits_numbered() -> None:
    assert abi.feature_names(abi.UFFD_FEATURE_MOVE | abi.UFFD_FEATURE_EVENT_FORK | 1 << 40) == [
        "UFFD_FEATURE_EVENT_FORK",
        "UFFD_FEATURE_MOVE",
        "bit 40",
    ]


def test_a_refusal_for_an_unread_event_differs_from_partial_progress() -> None:
    assert abi.Outcome(0, errno.EAGAIN).event_pending
    assert not abi.Outcome(4096, errno.EAGAIN).event_pending
    with pytest.raises(OSError, match="4096 bytes done"):
        abi.Outcome(4096, errno.EAGAIN).check()
    assert abi.Outcome(4096, 0).check() == 4096
