"""How Sphinx builds the documentation: `make docs`.

USERFAULT_INTERSPHINX=1 links names of Python and NumPy to their own pages. That needs the network, so it is
off by default.
"""

import os
import tomllib
from pathlib import Path

_project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

project = _project["name"]
release = version = _project["version"]
copyright = "the userfault authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
    }
    if os.environ.get("USERFAULT_INTERSPHINX") == "1"
    else {}
)

exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"userfault {release}"
