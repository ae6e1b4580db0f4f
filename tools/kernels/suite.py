"""What is run under each kernel: `python -m tools.kernels.suite NAME ...` does it, inside of the machine.

    conformance   the checklist of tests/conformance against the kernel that runs
    machines      50 examples of each state machine of tests/machines
    kills         20 kills of a program that writes a file through a region
    engine        tests of the engine, built on the host: what is dirty, lost writes, store errors

Each part prints what it does, and the counts of all are written to $USERFAULT_KERNELS_RESULT as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent.parent
RESULT = "USERFAULT_KERNELS_RESULT"
SCALE = "USERFAULT_TIME_SCALE"
BINARIES = "USERFAULT_KERNELS_BINARIES"
"""Names the built tests of the engine, with colons between."""

EXAMPLES, STEPS = 50, 20
KILLS = 20


@dataclass
class Counts:
    """What came of one part."""

    passed: int = 0
    skipped: int = 0
    failed: int = 0

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.skipped} skipped, {self.failed} failed"


def counted(report: str) -> Counts:
    """The counts of a JUnit report, as pytest writes it."""
    counts = Counts()
    for case in ElementTree.fromstring(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts.failed += 1
        elif "skipped" in kinds:
            counts.skipped += 1
        else:
            counts.passed += 1
    return counts


def pytest(*arguments: str) -> Counts:
    """Runs some tests. A run that ends without a report has failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", f"--junit-xml={report}"]
        status = subprocess.run([sys.executable, *command, *arguments], cwd=ROOT, check=False).returncode
        if not report.exists():
            print(f"pytest ended with status {status} and without a report", flush=True)
            return Counts(failed=1)
        return counted(report.read_text())


def conformance() -> Counts:
    """The checklist."""
    return pytest("tests/conformance/test_kernel.py")


def machines() -> Counts:
    """Each machine in a process of its own, which is killed when its time is over."""
    folder = ROOT / "tests" / "machines"
    names = re.search(r"^MACHINES = \[(.*?)\]", (folder / "test_machines.py").read_text(), re.M | re.S)
    assert names is not None
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "USERFAULT_DEBUG": "hash"}
    counts = Counts()
    unfit = inline_writes_are_refused()
    for name in re.findall(r'"([\w-]+)"', names[1]):
        if unfit and "inline" in name:
            print(f"{name}: skipped: {unfit}", flush=True)
            counts.skipped += EXAMPLES
            continue
        begin = time.monotonic()
        # The steps of several threads are waits for each other.
        steps = STEPS if not name.startswith("threads") else 8
        command = [sys.executable, str(folder / "drive.py"), name, str(EXAMPLES), str(steps)]
        ended = limited(command, environment, 240 * scale())
        print(f"{name}: {EXAMPLES} examples, {ended}, {time.monotonic() - begin:.0f} s", flush=True)
        if ended == "well":
            counts.passed += EXAMPLES
        else:
            counts.failed += 1
    return counts


def inline_writes_are_refused() -> str:
    """Why this kernel has no writable regions with `fault="inline"`, in the library's words; "" if it has."""
    import userfault

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        path.write_bytes(bytes(4096))
        try:
            userfault.open(path, "r+", fault="inline").close()
        except ValueError as refused:
            return str(refused)
    return ""


def limited(command: Sequence[str], environment: dict[str, str], seconds: float) -> str:
    """Runs a program in a group that is killed at the end: "well", or how it ended."""
    child = subprocess.Popen(command, env=environment, process_group=0)
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"not within {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return "well" if status == 0 else f"with status {status}"


PAGES, TOUCHED = 512, 64


def write(path: Path, block: int, lines: int) -> None:
    """Fills some pages with the number of the step, flushes, and says so: step after step, for ever."""
    import numpy as np

    import userfault

    with userfault.open(path, "r+", block=block, memory_limit=64 << 10) as region:
        words = region.ndarray(np.uint64).reshape(PAGES, 512)
        step = int(words[:, 0].max())
        os.write(lines, b"begins\n")
        while True:
            step += 1
            for page in np.random.default_rng(step).permutation(PAGES)[:TOUCHED]:
                words[page] = step
            region.flush()
            os.write(lines, b"%d\n" % step)


def kills() -> Counts:
    """Kills the writer at a random moment, again and again, and looks at the file each time."""
    chance, counts = random.Random(1), Counts()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        path.write_bytes(bytes(PAGES * 4096))
        for turn in range(KILLS):
            wrong = killed(path, (4096, 65536)[turn % 2], chance)
            print(f"kill {turn}: {wrong or 'the file is right'}", flush=True)
            counts.passed += not wrong
            counts.failed += bool(wrong)
    return counts


def killed(path: Path, block: int, chance: random.Random) -> str:
    """One turn; what is wrong with the file afterwards.

    The writer is a fork, since an emulated machine takes a while to start an interpreter.
    """
    before = max(page[0] for page in pages(path.read_bytes()))
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write(path, block, writable)
        finally:
            os._exit(1)
    os.close(writable)
    with os.fdopen(readable) as lines:
        first = lines.readline()
        time.sleep(chance.random() * scale() / 2)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if first != "begins\n":
            return "the writer did not begin"
        flushed = [int(line) for line in lines if line.endswith("\n")]
    return judged(path.read_bytes(), max(flushed, default=before))


def pages(content: bytes) -> list[memoryview]:
    """The pages of the writer's file, as words."""
    words = memoryview(content).cast("Q")
    return [words[start : start + 512] for start in range(0, len(words), 512)]


def judged(content: bytes, flushed: int) -> str:
    """What is wrong with the writer's file, when it said that step `flushed` is durable; "" if nothing is."""
    torn = [number for number, page in enumerate(pages(content)) if len(set(page)) != 1]
    if torn:
        return f"pages {torn} are torn"
    newest = max(page[0] for page in pages(content))
    if not flushed <= newest <= flushed + 1:
        return f"step {flushed} was flushed, the newest in the file is {newest}"
    return ""


def engine() -> Counts:
    """The built tests, one after the other: several at once only slow each other down."""
    counts = Counts()
    for binary in filter(None, os.environ.get(BINARIES, "").split(":")):
        command = [binary, "--test-threads=1"]
        output = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                print(line, end="", flush=True)
                output += line
        found = summed(output)
        counts.passed += found.passed
        counts.skipped += found.skipped
        # A program that ends without a summary has failed.
        counts.failed += max(found.failed, int(child.returncode != 0))
    if counts == Counts():
        print("the tests of the engine were not built", flush=True)
        counts.failed += 1
    return counts


def summed(output: str) -> Counts:
    """The counts of the last lines that Rust's test programs print."""
    counts = Counts()
    for ended in re.finditer(r"^test result: .*? (\d+) passed; (\d+) failed; (\d+) ignored", output, re.M):
        passed, failed, ignored = map(int, ended.groups())
        counts.passed, counts.failed = counts.passed + passed, counts.failed + failed
        counts.skipped += ignored
    return counts


def scale() -> float:
    """By how much time limits are longer than on an idle machine of one's own."""
    return float(os.environ.get(SCALE, "1"))


PARTS: dict[str, Callable[[], Counts]] = {
    "conformance": conformance,
    "machines": machines,
    "kills": kills,
    "engine": engine,
}


def main(names: Sequence[str]) -> int:
    """Does the parts; 1 if something failed."""
    results: dict[str, Counts] = {}
    for name in names or PARTS:
        print(f"== {name}", flush=True)
        results[name] = PARTS[name]()
        if result := os.environ.get(RESULT):
            Path(result).write_text(json.dumps({part: asdict(counts) for part, counts in results.items()}))
    return int(any(counts.failed for counts in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
