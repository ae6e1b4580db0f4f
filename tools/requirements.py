"""Print the packages that pyproject.toml asks for: the build's, the package's own and the named extras'.

The extension is built in a step of its own (see the Makefile), so pip is given the requirements alone.
"""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in sys.argv[1:]:
        wanted += project["project"]["optional-dependencies"][extra]
    print("\n".join(dict.fromkeys(wanted)))


if __name__ == "__main__":
    main()
