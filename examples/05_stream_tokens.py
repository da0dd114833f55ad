"""Stream: read chunks of any length and decode token by token, in constant memory, with the results of the whole."""

import torch

import sma
from sma_models.inference.generation import generate

torch.manual_seed(0)
model = sma.build("seqboat_small_lm").eval()
tokens = torch.randint(0, 256, (2, 700))

with torch.no_grad():
    whole = model(tokens).logits
    state = model.initial_state(batch=2)
    parts, sizes = [], []
    for chunk in tokens.split([400, 1, 250, 49], dim=1):
        out = model(chunk, state)
        state = out.state
        parts.append(out.logits)
        sizes.append(state.nbytes)
error = (torch.cat(parts, 1) - whole).abs().max().item()
print(f"largest difference between chunks and the whole: {error:.1e}; state: {sizes[0]:,} bytes, then {sizes[-1]:,}")
assert error < 1e-3
assert len(set(sizes)) == 1

text = generate(
    model, torch.tensor([list(b"import ")]), 20, temperature=0.8, generator=torch.Generator().manual_seed(0)
)
print("an untrained model generates:", bytes(text[0].tolist()))
assert text.shape == (1, 20)
