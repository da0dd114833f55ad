"""Every registered model obeys the laws."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sma.layer import ActivatedConfig
from sma.routing import Routing
from sma.state import State
from sma.testing import ModelSuite, Result
from sma_models.classifier import Classifier
from sma_models.language_model import LanguageModel
from sma_models.retrieval import Retrieval
from sma_models.seqboat import SeqBoat
from sma_modules.mixers.ema import EMA
from sma_modules.modules.gau import GAU
from sma_modules.norms import LayerNorm
from tests.laws.table import covers

BLOCK = SeqBoat.Config(
    mixer=EMA.Config(n_state=4), activate=ActivatedConfig(module=GAU.Config(d_qk=4, d_v=12, window=3))
)


class TestLanguageModel(ModelSuite):
    config = LanguageModel.Config(d_model=8, n_layers=2, blocks=(BLOCK,), vocab_size=11, final_norm=LayerNorm.Config())
    causal = True
    streams = True


class TestLanguageModelCheckpointed(ModelSuite):
    """The same with every block recomputed in the backward pass."""

    config = LanguageModel.Config(
        d_model=8, n_layers=2, blocks=(BLOCK,), vocab_size=11, tie_embeddings=False, checkpoint=True, dropout=0.1
    )
    causal = True
    streams = True


class TestClassifier(ModelSuite):
    config = Classifier.Config(d_model=8, n_layers=2, blocks=(BLOCK,), vocab_size=11, n_classes=3)
    per_token = False
    shortest = 1


class TestClassifierOfSignals(ModelSuite):
    """Real numbers in, absolute positions, the first token is pooled."""

    config = Classifier.Config(
        d_model=8, n_layers=1, blocks=(BLOCK,), n_classes=3, positions="sinusoidal", pool="first", causal=True
    )
    vocab_size = None
    real_input = True
    per_token = False
    shortest = 1


class TestRetrieval(ModelSuite):
    """Each sequence is matched with itself, backwards."""

    config = Retrieval.Config(d_model=8, n_layers=1, blocks=(BLOCK,), vocab_size=11)
    per_token = False
    shortest = 1

    def call(
        self,
        module: nn.Module,
        x: Tensor,
        state: State | None = None,
        *,
        valid: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> Result:
        flipped = None if valid is None else valid.flip(1)
        out = module(x, x.flip(1), valid=(valid, flipped), replay=_flip(replay) if replay else None)
        return Result(out.logits, None, _flip(out.routings), out.losses)


def _flip(routings: Mapping[str, Routing]) -> dict[str, Routing]:
    """The routings of the second sequence in the columns of the first."""
    return {
        name: Routing(*(part.flip(1) for part in (r.active, r.confidence, r.valid, r.position)))
        if name.startswith("second.")
        else r
        for name, r in routings.items()
    }


test_every_model_is_here = covers("model", globals())
