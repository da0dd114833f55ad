"""Compose an architecture: three kinds of module in one layer, each with its configurator. Count the savings."""

import torch

import sma
from sma.statistics import operations

model = sma.build("three_module_lm", "d_model=64", "n_layers=2").eval()
tokens = torch.randint(0, 256, (2, 256))
with torch.no_grad():
    out = model(tokens)
    for name, routing in out.routings.items():
        print(f"{name}: {routing.rate().mean():.0%} active")
    count = operations(lambda replay: model(tokens, replay=replay))
print(f"{count.spent / 1e6:.0f} of {count.always_on / 1e6:.0f} million operations: {count.saved:.0%} saved")
print("auxiliary losses:", ", ".join(sorted(model.train()(tokens).losses)))
assert 0 < count.spent <= count.always_on
