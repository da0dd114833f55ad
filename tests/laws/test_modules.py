"""Every registered activatable module obeys the laws, bidirectional and causal."""

from __future__ import annotations

from sma.testing import ModuleSuite
from sma_modules.modules.attention import Attention
from sma_modules.modules.ffn import FFN
from sma_modules.modules.gau import GAU
from sma_modules.modules.moe import MoE
from tests.laws.table import covers


class TestGAU(ModuleSuite):
    config = GAU.Config(d_qk=4, d_v=12, window=2, positions="simple", max_positions=6)


class TestGAULocalPositions(ModuleSuite):
    config = GAU.Config(d_qk=4, d_v=12, window=2, positions="local", activation="relu2")


class TestGAUChunked(ModuleSuite):
    config = GAU.Config(d_qk=4, d_v=12, window=None, chunk=3, positions="simple", max_positions=6)


class TestGAUCausal(ModuleSuite):
    config = GAU.Config(d_qk=4, d_v=12, window=3, positions="rotary")
    causal = True
    streams = True


class TestGAUCausalSimplePositions(ModuleSuite):
    config = GAU.Config(d_qk=4, d_v=12, window=3, positions="simple", max_positions=6, activation="relu2")
    causal = True
    streams = True


class TestGAUCausalLocalPositions(ModuleSuite):
    config = GAU.Config(d_qk=4, d_v=12, window=3, positions="local", activation="laplace")
    causal = True
    streams = True


class TestGAUCausalWithoutWindow(ModuleSuite):
    config = GAU.Config(d_qk=4, d_v=12, window=None, positions="none")
    causal = True


class TestAttention(ModuleSuite):
    config = Attention.Config(n_heads=2, window=2)


class TestAttentionCausal(ModuleSuite):
    config = Attention.Config(n_heads=4, n_kv_heads=2, window=3, qkv_bias=False)
    causal = True
    streams = True


class TestAttentionCausalChunked(ModuleSuite):
    config = Attention.Config(n_heads=2, chunk=3, positions="none")
    causal = True
    streams = True


class TestAttentionCausalWithoutWindow(ModuleSuite):
    config = Attention.Config(n_heads=2)
    causal = True


class TestFFN(ModuleSuite):
    config = FFN.Config(d_hidden=12, dropout=0.1)
    streams = True


class TestFFNGated(ModuleSuite):
    config = FFN.Config(d_hidden=12, gated=True, activation="silu", bias=False)
    causal = True
    streams = True


class TestMoE(ModuleSuite):
    config = MoE.Config(n_experts=3, top_k=2, d_hidden=6)
    streams = True


class TestMoESharedExpert(ModuleSuite):
    config = MoE.Config(n_experts=4, top_k=1, renormalise=False, d_hidden=6, gated=False, activation="gelu", d_shared=5)
    causal = True
    streams = True


test_every_module_is_here = covers("module", globals())
