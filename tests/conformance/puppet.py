"""Building puppet.c, the process whose memory the tests use."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from conformance.backend import Unavailable


def build(folder: Path) -> Path:
    """Compiles puppet.c into a folder: the program. Unavailable without a C compiler."""
    if shutil.which("cc") is None:
        raise Unavailable("no C compiler (cc) to build the touching process with: apt install gcc")
    binary = folder / "puppet"
    source = Path(__file__).parent / "puppet.c"
    subprocess.run(["cc", "-O2", "-pthread", "-o", binary, source], check=True)
    return binary
