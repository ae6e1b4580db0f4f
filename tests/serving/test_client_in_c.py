"""The C program of the how-to is a client of the page server."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sysconfig
from pathlib import Path

from serving.puppeteer import LIMIT, contents
from userfault import MemoryStore, serve
from userfault.serving import receive

PAGE = Path(__file__).parent.parent.parent / "docs" / "how-to" / "serve-another-process.md"


def test_the_c_program_of_the_how_to_is_served(tmp_path: Path) -> None:
    [program] = re.findall(r"^```c\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    source, binary = tmp_path / "client.c", tmp_path / "client"
    source.write_text(program)
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")[:1]
    subprocess.run([*compiler, "-Wall", "-Wextra", "-Werror", "-o", binary, source], check=True)
    data = contents(1 << 20)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "pages.sock"))
        listener.listen()
        listener.settimeout(LIMIT)
        client = subprocess.Popen(
            [binary, tmp_path / "pages.sock"], stdout=subprocess.PIPE, text=True, process_group=0
        )
        try:
            connection, _ = listener.accept()
            with connection:
                uffd, layout, pid = receive(connection)
            assert pid == client.pid
            with uffd:
                served = serve(uffd, layout, MemoryStore(data), pid=pid)
            output, _ = client.communicate(timeout=LIMIT)
            assert int(output) == sum(data)
            assert served.wait(LIMIT)
        finally:
            client.kill()
            client.wait()
