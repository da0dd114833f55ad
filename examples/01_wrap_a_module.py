"""Wrap any module: it then runs only on some tokens, and the router learns which.

The task: sequences of random vectors in which some tokens carry a mark. Marked tokens need a non-linear function, the
others need nothing. The configurator does not know this. A loss on the rate keeps activation low.
"""

import torch
from torch import nn

from sma import SparselyActivated
from sma.configurators import RateLoss

torch.manual_seed(0)
d_model = 32
ffn = SparselyActivated(
    nn.Sequential(nn.Linear(d_model, 128), nn.GELU(), nn.Linear(128, d_model)),
    rate_loss=RateLoss.Config(target=0.25, weight=1.0).build(),
)
optimiser = torch.optim.Adam(ffn.parameters(), lr=3e-3)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs (B, L, D), targets (B, L, D), and which tokens are marked (B, L)."""
    x = torch.randn(8, 64, d_model)
    marked = torch.rand(8, 64) < 0.25
    x[..., 0] = torch.where(marked, 2.0, -2.0)
    return x, x.roll(1, -1) * marked[..., None], marked


for _ in range(400):
    x, target, _ = batch()
    output, _, routing, losses = ffn(x)
    loss = (output - target).square().mean() + losses["rate"]
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

x, target, marked = batch()
output, _, routing, _ = ffn(x)
active = routing.active[..., 0]
agreement = (active == marked).float().mean().item()
print(f"active: {active.float().mean():.0%} of the tokens; right about {agreement:.0%} of them")
assert agreement > 0.95, agreement
