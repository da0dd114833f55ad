"""Configuration of the documentation. No network is needed: references into other projects are left as plain text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import sma

project = "Sparse Modular Activation"
author = copyright = "The sma authors"
version = release = sma.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"sma {release}"

autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Otherwise the fields of a dataclass would be described twice: by its docstring and as its attributes.
napoleon_use_ivar = True

# Names of other projects, and of type variables, have no page here. Everything else must resolve.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|np|numpy|lightning|omegaconf|pluggy|pathlib|importlib|collections|typing|types)\..*"),
    (r"py:.*", r"(Tensor|Module|Parameter|Traversable|PathLike|os\.PathLike|Path|Generator|Iterator|Iterable)"),
    (r"py:.*", r"(Callable|Mapping|Sequence|Any|Self|Literal.*|ClassVar|Final|NamedTuple|Protocol|T|S|optional)"),
    (r"py:.*", r"(Float|Int|Bool|jaxtyping)(\..*|\[.*)?"),
]
