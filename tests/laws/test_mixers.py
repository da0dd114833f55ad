"""Every registered mixer obeys the laws, bidirectional and causal."""

from __future__ import annotations

from sma.testing import MixerSuite
from sma_modules.mixers.attention import AttentionMixer
from sma_modules.mixers.ema import EMA
from tests.laws.table import covers


class TestEMA(MixerSuite):
    config = EMA.Config(n_state=4)


class TestEMATruncated(MixerSuite):
    config = EMA.Config(n_state=4, truncation=3)


class TestEMACausal(MixerSuite):
    config = EMA.Config(n_state=4)
    causal = True
    streams = True


class TestEMACausalTruncated(MixerSuite):
    config = EMA.Config(n_state=4, truncation=3)
    causal = True
    streams = True


class TestAttentionMixer(MixerSuite):
    config = AttentionMixer.Config(n_heads=2, window=2)


class TestAttentionMixerCausal(MixerSuite):
    config = AttentionMixer.Config(n_heads=4, n_kv_heads=2, window=3)
    causal = True
    streams = True


class TestAttentionMixerCausalChunked(MixerSuite):
    config = AttentionMixer.Config(n_heads=2, chunk=3, positions="none")
    causal = True
    streams = True


class TestAttentionMixerCausalWithoutWindow(MixerSuite):
    config = AttentionMixer.Config(n_heads=2)
    causal = True


test_every_mixer_is_here = covers("mixer", globals())
