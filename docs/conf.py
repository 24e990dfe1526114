"""The site of the documentation: ``sphinx-build -n -W docs site`` fails on a broken link or reference."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".typing"))

project = "xpar"
copyright = "the xpar developers"
html_title = "xpar"
html_theme = "furo"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.apidoc",
]
exclude_patterns = ["site"]
suppress_warnings = ["ref.python"]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

apidoc_modules = [
    {
        "path": str(ROOT / ".typing" / "xpar"),
        "destination": "api",
        "implicit_namespaces": True,
        "follow_links": True,
        "separate_modules": False,
        "include_private": False,
    }
]
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_member_order = "bysource"
# Types stand in the signatures; links go to what xpar defines.
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpick_ignore_regex = [(r"py:.*", r"(?!xpar).*")]
