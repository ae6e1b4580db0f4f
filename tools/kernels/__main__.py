"""`python -m tools.kernels [KERNEL ...] [--parts ...]`, or `... KERNEL -- COMMAND`: see the package."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from . import fetch, machine, suite

ROOT = Path(__file__).parent.parent.parent
SERIES = ("6.1", "6.12")
SLOWER = 5.0
"""By how much the limits of the tests grow under emulation."""


ENGINE_TESTS = ("dirty_evidence", "lost_writes", "store_errors")


def built() -> list[str]:
    """Builds those tests of the engine that run under each kernel; the paths of their programs."""
    command = ["cargo", "test", "--release", "-p", "userfault-engine", "--no-run", "--message-format=json"]
    wanted = [word for name in ENGINE_TESTS for word in ("--test", name)]
    done = subprocess.run([*command, *wanted], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise fetch.Missing("the tests of the engine do not build")
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    return [message["executable"] for message in messages if message.get("executable")]


def environment(accelerated: bool, binaries: list[str]) -> dict[str, str]:
    """Ours, but for folders that are not there, with the scale of the time limits."""
    return {
        suite.BINARIES: ":".join(binaries),
        **os.environ,
        "TMPDIR": "/run/scratch",
        suite.SCALE: os.environ.get(suite.SCALE, "1" if accelerated else str(SLOWER)),
        suite.RESULT: "/run/job/result",
    }


def run(
    series: str, command: list[str], binaries: list[str], options: argparse.Namespace
) -> tuple[int | None, str, str]:
    """Runs one command under one kernel: its status, the kernel's package, the counts as JSON."""
    kernel = fetch.kernel(series, options.store)
    print(f"{series}: {kernel.package}", flush=True)
    with machine.job_folder() as folder:
        job = Path(folder)
        ended = machine.run(
            machine.Machine(memory=options.memory, accelerated=options.kvm),
            kernel,
            command,
            folder=ROOT,
            environment=environment(options.kvm, binaries),
            seconds=options.minutes * 60,
            job=job,
            prefix=f"{series}| ",
        )
        if ended.status is None:
            print(f"{series}: the machine ended before the command did:\n{ended.console[-3000:]}")
        result = job / "result"
        return ended.status, kernel.package, result.read_text() if result.exists() else "{}"


def main() -> int:
    """The counts of each kernel; 1 if something failed, 2 if something is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels", description="Run tests, or a command, under older kernels in QEMU."
    )
    parser.add_argument("series", nargs="*", default=SERIES, help=f"6.1 ...; default: {' '.join(SERIES)}")
    parser.add_argument("--parts", default=",".join(suite.PARTS), help="of the tests, with commas between")
    parser.add_argument("--minutes", type=float, default=90, help="that each kernel may take")
    parser.add_argument("--memory", type=int, default=2048, help="of the machine, MiB")
    parser.add_argument("--kvm", action="store_true", help="use /dev/kvm instead of emulation")
    store = os.environ.get("USERFAULT_KERNELS", ROOT / "target" / "kernels")
    parser.add_argument("--store", type=Path, default=store, help="where kernels are kept")
    words = sys.argv[1:]
    command = words[words.index("--") + 1 :] if "--" in words else []
    options = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    parts = options.parts.split(",")
    if unknown := set(parts) - suite.PARTS.keys():
        parser.error(f"no such parts: {', '.join(sorted(unknown))}")

    failed = False
    lines: list[str] = []
    binaries: list[str] = []
    for series in options.series:
        try:
            if not command and "engine" in parts and not binaries:
                binaries = built()
            tests = [sys.executable, "-m", "tools.kernels.suite", *parts]
            status, package, result = run(series, command or tests, binaries, options)
        except (fetch.Missing, TimeoutError) as error:
            print(f"{series}: {error}", file=sys.stderr)
            return 2
        failed = failed or status != 0
        for part, counts in json.loads(result).items():
            lines.append(f"{series:5} {part:12} {suite.Counts(**counts)}   ({package})")
        if status != 0:
            lines.append(f"{series:5} ended with status {status}")
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
