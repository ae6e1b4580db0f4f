"""Builds the wheel without the compiled part: `python tools/pure_wheel.py FOLDER`.

A build backend wants its sources below its own pyproject.toml, so the package is copied beside the one in
`packaging/pure` first. It needs hatchling, from where pip gets it, or already installed with --no-isolation.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent


def build(folder: Path, *, isolated: bool = True) -> Path:
    """Build the wheel into `folder` and return its path. Raises RuntimeError, with pip's words."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        tree = Path(scratch) / "userfault"
        tree.mkdir()
        shutil.copy(ROOT / "packaging" / "pure" / "pyproject.toml", tree)
        shutil.copy(ROOT / "LICENSE", tree)
        shutil.copytree(
            ROOT / "src" / "userfault",
            tree / "src" / "userfault",
            ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd"),
        )
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
        if not isolated:
            command.append("--no-build-isolation")
        done = subprocess.run([*command, str(tree)], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("userfault-*-py3-none-any.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(done.stderr.strip() or "pip built no wheel")
    return wheels[-1]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Builds the wheel without the compiled part.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-isolation", action="store_true", help="use the hatchling that is installed")
    arguments = parser.parse_args()
    print(build(arguments.folder, isolated=not arguments.no_isolation))


if __name__ == "__main__":
    main()
