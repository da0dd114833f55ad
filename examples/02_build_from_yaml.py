"""Build a model from a spec: shipped, with a change, or your own YAML. Errors are raised before any work."""

from pathlib import Path

import torch

import sma

model = sma.build("seqboat_text", "n_layers=2", "d_model=64")
tokens = torch.randint(0, 256, (2, 300))
valid = torch.ones(2, 300, dtype=torch.bool)
valid[1, 200:] = False
out = model(tokens, valid=valid)
print(f"logits {tuple(out.logits.shape)}; rate of activation per layer:")
for name, routing in out.routings.items():
    print(f"  {name}: {routing.rate().mean():.0%}")
assert out.logits.shape == (2, 2)

own = sma.build(Path(__file__).with_name("hybrid.yaml"))
print(f"own spec: {sum(p.numel() for p in own.parameters()):,} parameters")

try:
    sma.build("seqboat_text", "blocks[0].activate.module.widow=64")
except sma.SMAError as error:
    message = str(error)
print(f"a typo: {message}")
assert "window" in message
