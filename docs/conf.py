"""The site of the documentation: ``sphinx-build -n -W docs site`` fails on a broken link or reference."""

import sys
from pathlib import Path
from typing import Any

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
# Type variables have no page.
nitpick_ignore_regex = [(r"py:.*", r"(?!xpar).*"), (r"py:.*", r"xpar\..*\.[A-Z]")]


def skip_module_name(app: Any, what: str, name: str, value: object, skip: bool, options: Any) -> bool | None:
    """Skip a function that a package exports under the name of the function's own module.

    The page of the module describes both; a second description would be a duplicate.
    """
    module = getattr(value, "__module__", None)
    is_module_name = isinstance(module, str) and module.rpartition(".")[2] == name
    return True if is_module_name and app.env.temp_data.get("autodoc:module") != module else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip_module_name)
