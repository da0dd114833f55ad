"""What two processes do with ``fully_shard`` of one part after the other."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sma.interfaces import Block, Configurator, Mixer, Module, Norm
from sma.layer import SparseMixture
from sma_models.inference import Decoder
from sma_models.language_model import LanguageModel
from tests.models.tiny import call, inputs_of, loss_of, tiny

SHARDED = (Block, Mixer, Module, Norm, SparseMixture, Configurator, nn.Linear, nn.Embedding)
MODELS = (
    "seqboat_small_lm",
    "mega_lm",
    "three_module_lm",
    "ema_moe_lm",
    "mixture_of_depths_lm",
    "seqboat_text",
    "seqboat_image",
)
"""They hold a part of every registered class that has parameters."""
WORLD = 2


def parts_of(model: nn.Module) -> list[str]:
    """The first part of every class, in every place that it may have, of those with parameters."""
    found: dict[tuple[type, str], str] = {}
    for name, each in model.named_modules():
        if name and isinstance(each, SHARDED) and any(True for _ in each.parameters()):
            place = ".".join(word for word in name.split(".") if not word.isdigit())
            found.setdefault((type(each), place), name)
    return list(found.values())


def one(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients."""
    loss = loss_of(call(model, tokens))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(name: str, spec: str, mesh: Any) -> str | None:
    """What is wrong when the part ``name`` is sharded; every process gives its own half of the batch."""
    rank = dist.get_rank()
    batch = inputs_of(tiny(spec), batch=4, length=9)
    halves = [batch[:2], batch[2:]]
    plain = tiny(spec).double().eval()
    inputs = [half.double() if half.is_floating_point() else half for half in halves]
    loss, first = one(plain, inputs[rank])
    plain.zero_grad()
    _, second = one(plain, inputs[1 - rank])
    model = tiny(spec).double().eval()
    fully_shard(model.get_submodule(name), mesh=mesh)
    sharded = {key for key, p in model.named_parameters() if isinstance(p, DTensor)}
    actual, gradients = one(model, inputs[rank])
    torch.testing.assert_close(actual, loss, rtol=1e-9, atol=1e-9, msg=f"loss {actual} instead of {loss}")
    for key, gradient in gradients.items():
        expected = first.get(key, 0) if key not in sharded else (first.get(key, 0) + second.get(key, 0)) / WORLD
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9, msg=f"gradient of {key}")
    missing = first.keys() - gradients.keys()
    assert not missing, f"no gradient at {sorted(missing)}"
    return decode(model, plain, inputs[rank]) if isinstance(model, LanguageModel) else None


def decode(model: LanguageModel, plain: LanguageModel, tokens: Tensor) -> str | None:
    """A prompt and two steps are those of the plain model."""
    outputs = []
    for each in (model, plain):
        decoder = Decoder(each, 2)
        decoder.join_all(tokens[:, :5])
        outputs.append(torch.stack([decoder.logits.clone(), *(decoder.step(tokens[:, t]).clone() for t in (5, 6))]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9, msg="steps of a Decoder differ")
    return None


def cases() -> Iterator[tuple[str, str]]:
    """Every model with every part of it."""
    for spec in MODELS:
        yield from ((spec, name) for name in parts_of(tiny(spec)))


def run(rank: int, folder: str) -> None:
    """One of the processes: writes what was wrong, a line a case, to ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    try:
        with (Path(folder) / f"{rank}.txt").open("w", encoding="utf-8") as file:
            for spec, name in cases():
                print(f"{spec}: {name}: {_guarded(name, spec, mesh)}", file=file, flush=True)
    finally:
        dist.destroy_process_group()


def _guarded(name: str, spec: str, mesh: Any) -> str:
    try:
        return difference(name, spec, mesh) or "works"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error).splitlines()[0]} ({Path(last.filename).name}:{last.lineno})"
