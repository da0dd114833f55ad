"""Every registered block obeys the laws, with the parts that recipes combine."""

from __future__ import annotations

from sma.configurators import ExpertChoice, GumbelSoftmax, RateLoss, Sigmoid, TopK
from sma.layer import ActivatedConfig, MixtureConfig
from sma.testing import BlockSuite
from sma_models.hybrid import Hybrid, SublayerConfig
from sma_models.mega import Mega, MegaAttention
from sma_models.seqboat import SeqBoat
from sma_modules.mixers.ema import EMA
from sma_modules.modules.attention import Attention
from sma_modules.modules.ffn import FFN
from sma_modules.modules.gau import GAU
from sma_modules.modules.moe import MoE
from sma_modules.norms import BatchNorm, ScaleNorm
from tests.laws.table import covers

EMA4 = EMA.Config(n_state=4)
GAU4 = GAU.Config(d_qk=4, d_v=12, window=2)
FFN12 = FFN.Config(d_hidden=12)


class TestSeqBoat(BlockSuite):
    config = SeqBoat.Config(mixer=EMA4, activate=ActivatedConfig(module=GAU4), norm=ScaleNorm.Config(), prenorm=False)


class TestSeqBoatBatchNorm(BlockSuite):
    config = SeqBoat.Config(
        mixer=EMA.Config(n_state=4, truncation=4),
        activate=ActivatedConfig(
            module=GAU.Config(d_qk=4, d_v=12, window=2, activation="relu2", positions="local"),
            configurator=ExpertChoice.Config(rate=0.5),
        ),
        norm=BatchNorm.Config(),
    )


class TestSeqBoatCausal(BlockSuite):
    config = SeqBoat.Config(
        mixer=EMA4,
        activate=ActivatedConfig(module=GAU4, rate_loss=RateLoss.Config(target=0.3)),
        dropout=0.1,
    )
    causal = True
    streams = True


class TestMega(BlockSuite):
    config = Mega.Config(
        mixer=EMA4,
        attention=MegaAttention.Config(d_qk=4, d_v=12, window=None, positions="simple", max_positions=6),
        ffn=FFN12,
    )
    routes = False


class TestMegaChunkCausal(BlockSuite):
    config = Mega.Config(
        mixer=EMA4,
        attention=MegaAttention.Config(d_qk=4, d_v=12, window=None, chunk=3, positions="rotary"),
        ffn=FFN12,
        prenorm=False,
    )
    causal = True
    streams = True
    routes = False


class TestTransformer(BlockSuite):
    config = Hybrid.Config(
        sublayers=(SublayerConfig(module=Attention.Config(n_heads=2)), SublayerConfig(module=FFN12)), prenorm=False
    )
    routes = False


class TestTransformerCausal(BlockSuite):
    config = Hybrid.Config(
        sublayers=(SublayerConfig(module=Attention.Config(n_heads=2, window=3)), SublayerConfig(module=FFN12))
    )
    causal = True
    streams = True
    routes = False


class TestMixtureOfDepths(BlockSuite):
    config = Hybrid.Config(
        sublayers=(
            SublayerConfig(module=Attention.Config(n_heads=2)),
            SublayerConfig(activate=ActivatedConfig(module=FFN12, configurator=TopK.Config(over="sequence", rate=0.5))),
        )
    )


class TestThreeModules(BlockSuite):
    """An EMA, then three modules of which each has its own configurator."""

    config = Hybrid.Config(
        sublayers=(
            SublayerConfig(mixer=EMA4),
            SublayerConfig(activate=ActivatedConfig(module=GAU4)),
            SublayerConfig(activate=ActivatedConfig(module=FFN12, configurator=Sigmoid.Config())),
            SublayerConfig(
                activate=ActivatedConfig(
                    module=MoE.Config(n_experts=3, top_k=1, renormalise=False, d_hidden=6),
                    configurator=GumbelSoftmax.Config(),
                )
            ),
        )
    )
    causal = True
    streams = True


class TestMixtureOfExperts(BlockSuite):
    """The paper's sum over modules, with a router that picks two of three."""

    config = Hybrid.Config(
        sublayers=(
            SublayerConfig(mixer=EMA4, dropout=0.1),
            SublayerConfig(
                mixture=MixtureConfig(modules=(GAU4, FFN12, FFN12), configurator=TopK.Config(k=2)), residual=False
            ),
        )
    )
    causal = True
    streams = True


test_every_block_is_here = covers("block", globals())
