"""Write a module of your own, register it under a name, and use the name in a spec."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sma


class LowRank(sma.Module):
    """``W2 W1 x`` with a narrow middle: a cheap correction for the tokens that need one. Works token by token."""

    layout = "tokens"

    @dataclass(kw_only=True, frozen=True)
    class Config(sma.Module.Config):
        rank: int = 8

        def __post_init__(self) -> None:
            self.require(self.rank >= 1, "rank", "must be at least 1")

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.down = nn.Linear(d_model, config.rank, bias=False)
        self.up = nn.Linear(config.rank, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(K, D)`` active tokens to ``(K, D)``."""
        return self.up(self.down(x))


sma.register("low_rank", LowRank)

model = sma.build(
    {
        "type": "language_model",
        "vocab_size": 256,
        "d_model": 32,
        "n_layers": 2,
        "blocks": [
            {
                "type": "hybrid",
                "sublayers": [{"mixer": "ema"}, {"activate": {"module": {"type": "low_rank", "rank": 4}}}],
            }
        ],
    }
)
out = model(torch.randint(0, 256, (1, 50)))
print({name: f"{routing.rate().mean():.0%}" for name, routing in out.routings.items()})
assert set(out.routings) == {"layers.0.sublayers.1.activate", "layers.1.sublayers.1.activate"}

# The laws of the library hold for your module too; its tests are a few lines (see sma.testing).
