"""The blocks, models, data and specs that ship with sma_models, registered by the same hook as those of any other
package.
"""

from collections.abc import Callable
from importlib import resources
from typing import Any

from sma.plugins import hookimpl

Register = Callable[[str, Any], None]


@hookimpl
def sma_register(register: Register) -> None:
    """Register blocks, models, data sets and every YAML file in ``specs/``."""
    _register_assemblies(register)
    _register_data(register)
    for spec in sorted(resources.files("sma_models").joinpath("specs").iterdir(), key=lambda path: path.name):
        if spec.name.endswith(".yaml"):
            register(spec.name.removesuffix(".yaml"), spec)


def _register_assemblies(register: Register) -> None:
    from sma_models import classifier, hybrid, language_model, mega, retrieval, seqboat

    register("seqboat", seqboat.SeqBoat)
    register("mega", mega.Mega)
    register("hybrid", hybrid.Hybrid)
    register("language_model", language_model.LanguageModel)
    register("classifier", classifier.Classifier)
    register("retrieval", retrieval.Retrieval)


def _register_data(register: Register) -> None:
    from sma_models.training.data import (
        enwik8,
        files,
        idx,
        image,
        listops,
        pathfinder,
        retrieval,
        speech,
        stdlib,
        text,
    )

    register("listops", listops.ListOpsData)
    register("image", image.ImageData)
    register("idx", idx.IdxData)
    register("text", text.TextData)
    register("speech", speech.SpeechData)
    register("pathfinder", pathfinder.PathfinderData)
    register("pairs", retrieval.RetrievalData)
    register("files", files.FilesData)
    register("stdlib", stdlib.StdlibData)
    register("enwik8", enwik8.Enwik8Data)
