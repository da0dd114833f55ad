"""The blocks, models, data and specs that ship with sma_models, registered through the same door as anyone's."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from sma.plugins import hookimpl


@hookimpl
def sma_register(register: Callable[[str, Any], None]) -> None:
    """Register blocks, models, data and every YAML file in ``specs/``."""
    from sma_models import classifier, hybrid, language_model, mega, retrieval, seqboat
    from sma_models.training.sources import labelled, language

    register("seqboat", seqboat.SeqBoat)
    register("mega", mega.Mega)
    register("hybrid", hybrid.Hybrid)
    register("language_model", language_model.LanguageModel)
    register("classifier", classifier.Classifier)
    register("retrieval", retrieval.Retrieval)
    register("listops", labelled.ListOps)
    register("image", labelled.Image)
    register("idx", labelled.Idx)
    register("text", labelled.Text)
    register("speech", labelled.Speech)
    register("pathfinder", labelled.Pathfinder)
    register("pairs", labelled.Retrieval)
    register("files", language.Files)
    register("stdlib", language.Stdlib)
    register("enwik8", language.Enwik8)
    for spec in sorted(files("sma_models").joinpath("specs").iterdir(), key=lambda path: path.name):
        if spec.name.endswith(".yaml"):
            register(spec.name.removesuffix(".yaml"), spec)
