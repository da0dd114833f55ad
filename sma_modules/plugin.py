"""The modules, mixers and norms that ship with sma_modules, registered by the same hook as any other's."""

from collections.abc import Callable
from typing import Any

from sma.plugins import hookimpl


@hookimpl
def sma_register(register: Callable[[str, Any], None]) -> None:
    """Register every module, mixer and norm."""
    from sma_modules import norms
    from sma_modules.mixers import attention as attention_mixer
    from sma_modules.mixers import ema
    from sma_modules.modules import attention, ffn, gau, moe

    register("gau", gau.GAU)
    register("attention", attention.Attention)
    register("attention_mixer", attention_mixer.AttentionMixer)
    register("ffn", ffn.FFN)
    register("moe", moe.MoE)
    register("ema", ema.EMA)
    register("layernorm", norms.LayerNorm)
    register("rmsnorm", norms.RMSNorm)
    register("scalenorm", norms.ScaleNorm)
    register("batchnorm", norms.BatchNorm)
    register("syncbatchnorm", norms.SyncBatchNorm)
