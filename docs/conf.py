"""Configuration of the documentation. No network is needed: references into other projects are left as plain text.

Tables and galleries that follow from the code are made by ``generated.py`` at every build, and reference pages by
``reference_pages.py``.
"""

import pkgutil
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import generated
import reference_pages

import sma

project = "Sparse Modular Activation"
author = copyright = "The sma authors"
version = release = sma.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_static_path = ["_static"]
html_title = f"sma {release}"

autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Otherwise the fields of a dataclass would be described twice: by its docstring and as its attributes.
napoleon_use_ivar = True

# Names of other projects, private names and type variables have no page here. Everything else must resolve.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|np|numpy|lightning|omegaconf|pluggy|pathlib|importlib|collections|typing|types)\..*"),
    (
        r"py:.*",
        r"(contextlib|rich|argparse|matplotlib|hypothesis|typer|transformers|tokenizers|fastapi|starlette|uvicorn|pydantic|annotated_types|asyncio|socket|random)\..*|Figure",
    ),
    (
        r"py:.*",
        r"(Tensor|Parameter|Traversable|PathLike|os\.PathLike|Path|Generator|Iterator|Iterable|ModuleType|WithJsonSchema|Random)",
    ),
    (r"py:.*", r"(Callable|Mapping|Sequence|Any|Self|Literal.*|ClassVar|Final|NamedTuple|Protocol|optional)"),
    (r"py:.*", r"(Float|Int|Bool|Activation|Compressor|jaxtyping)(\..*|\[.*)?"),
    (r"py:.*", r"(sma\w*\..*\.)?(_\w+(\.\w+)*|[A-Z]|Part|Samples|Test)"),
]


def _name_the_config(app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, result: Any) -> Any:
    """``config: Config`` means the Config of the class itself."""
    if what == "class" and signature:
        signature = re.sub(r"(?<![\w.])Config(?![\w.])", f"{name}.Config", signature)
    return signature, result


def _resolve_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A name refers to the object that it leads to, wherever that is described.

    A path through a package that imports the object (``sma.ops.compress.compress``) and a bare name that only one
    object of the library has (``Routing``) both do.
    """
    target = node.get("reftarget", "")
    domain = env.domains["py"] if node.get("refdomain") == "py" else None
    if domain is None or target == "Config" or not target:
        return None
    found = [name for name in domain.objects if name.endswith(f".{target}")]
    if len(found) != 1:
        path, _, attribute = target.rpartition(".")
        owners = _described(domain, path)
        found = _described(domain, target) or [f"{owner}.{attribute}" for owner in owners]
    if not found:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)


def _described(domain: Any, path: str) -> list[str]:
    """The names under which the class or function at ``path`` is described."""
    value = _object(path)
    return [] if value is None else _objects(domain).get(id(value), [])


def _object(path: str) -> Any:
    if not path.startswith("sma"):
        return None
    try:
        return pkgutil.resolve_name(path)
    except (AttributeError, ImportError, ValueError):
        return None


@cache
def _objects(domain: Any) -> dict[int, list[str]]:
    """The names under which each class and function is described, by the identity of the object."""
    found: dict[int, list[str]] = {}
    for name, entry in domain.objects.items():
        if entry.objtype in ("class", "exception", "function"):
            found.setdefault(id(_object(name)), []).append(name)
    return found


def _fill_in(app: Any, name: str, source: list[str]) -> None:
    source[0] = reference_pages.fill_in(generated.fill_in(source[0]))


def _write_pages(app: Any) -> None:
    reference_pages.write_made_pages()


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", _write_pages)
    app.connect("source-read", _fill_in)
    app.connect("autodoc-process-signature", _name_the_config)
    app.connect("missing-reference", _resolve_name)
