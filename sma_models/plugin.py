"""The blocks, models and specs that ship with sma_models, registered through the same door as anyone's."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from sma.plugins import hookimpl


@hookimpl
def sma_register(register: Callable[[str, Any], None]) -> None:
    """Register blocks, models and every YAML file in ``specs/``."""
    from sma_models import heads, hybrid, mega, seqboat

    register("seqboat", seqboat.SeqBoat)
    register("mega", mega.Mega)
    register("hybrid", hybrid.Hybrid)
    register("language_model", heads.LanguageModel)
    register("classifier", heads.Classifier)
    register("retrieval", heads.Retrieval)
    for spec in sorted(files("sma_models").joinpath("specs").iterdir(), key=lambda path: path.name):
        if spec.name.endswith(".yaml"):
            register(spec.name.removesuffix(".yaml"), spec)
