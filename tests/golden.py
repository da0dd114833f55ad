"""Check golden files: inputs, weights, outputs and gradients in float64 that an implementation has to reproduce.

    python tests/golden.py FILE...            # prints the largest errors per file and backend; exit code 1 above 1e-9
    python tests/golden.py --make FOLDER      # writes small files of our own, computed by the reference backend

A file holds ``x, y, grad_y, grad_x`` (B, L, D), ``valid`` (B, L) where there is padding, ``param.*`` and ``grad.*``
under the names of the published SeqBoat code, and ``meta``, a JSON string with the sizes and options.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sma
from sma.configurators import TemperedSoftmax
from sma.layer import ActivatedConfig
from sma.ops import using
from sma_models.convert import LAYER_RULES, _translate, convert_layer
from sma_models.seqboat import SeqBoat
from sma_modules.ema import EMA
from sma_modules.gau import GAU
from sma_modules.norms import BatchNorm, LayerNorm, RMSNorm, ScaleNorm

TOLERANCE = 1e-9
BACKENDS = ("reference", "eager")
NORMS = {"layernorm": LayerNorm, "batchnorm": BatchNorm, "scalenorm": ScaleNorm, "rmsnorm": RMSNorm}


def read(path: Path) -> dict[str, Any]:
    """Tensors by name, and ``meta`` as a dictionary."""
    with np.load(path, allow_pickle=False) as file:
        content: dict[str, Any] = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
        content["meta"] = json.loads(str(file["meta"]))
    return content


def _part(content: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}


def build_layer(meta: dict[str, Any]) -> nn.Module:
    """The module that a golden file describes, in float64 and evaluation mode."""
    torch.set_default_dtype(torch.float64)
    try:
        if meta["kind"] == "md_ema":
            ema = EMA.Config(n_state=meta["ndim"], truncation=meta["truncation"])
            return ema.build(d_model=meta["dim"], causal=not meta["bidirectional"]).eval()
        positions = "rotary" if meta["rel_pos_bias"] == "rotary" else "local" if meta["local_pos"] else "simple"
        gau = GAU.Config(
            d_qk=meta["zdim"],
            d_v=meta["hdim"],
            window=meta["window_size"],
            activation=meta["attention_activation"],
            positions=positions,
            max_positions=meta["max_positions"],
        )
        config = SeqBoat.Config(
            mixer=EMA.Config(n_state=meta["ndim"], truncation=meta["truncation"]),
            activate=ActivatedConfig(module=gau, configurator=TemperedSoftmax.Config()),
            norm=NORMS[meta["norm_type"]].Config(),
            prenorm=meta["prenorm"],
        )
        return config.build(d_model=meta["dim"], causal=not meta["bidirectional"]).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def run(content: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Everything that a golden file can hold, as computed by a backend, under the file's names."""
    meta = content["meta"]
    layer = build_layer(meta)
    is_ema = meta["kind"] == "md_ema"
    params = _part(content, "param.")
    layer.load_state_dict(params if is_ema else convert_layer(params))
    x = content["x"].clone().requires_grad_()
    lengths = content["valid"].sum(1) if "valid" in content else None
    result: dict[str, Tensor] = {}
    with using(backend):
        if is_ema:
            y, _ = layer(x, lengths=lengths)
        else:
            out = layer(x, lengths=lengths)
            y, routing = out.x, out.routings["activate"]
            result["active"] = routing.active[..., 0]
            result["probs"] = torch.stack([1 - routing.confidence[..., 0], routing.confidence[..., 0]], -1).detach()
        y.backward(content["grad_y"])
        if "y_step" in content:
            result["y_step"], result["state_last"] = _steps(layer, content["x"])
    result["y"] = y.detach()
    result["grad_x"] = x.grad
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    for name in _part(content, "grad."):
        ours = name if is_ema else _translate(name, LAYER_RULES)
        result[f"grad.{name}"] = grads[ours]
    return result


def _steps(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    state = layer.initial_state(x.shape[0], x)
    rows = []
    with torch.no_grad():
        for t in range(x.shape[1]):
            y, state = layer(x[:, t : t + 1], state)
            rows.append(y)
    return torch.cat(rows, 1), state.hidden


def errors(content: dict[str, Any], backend: str) -> Iterator[tuple[str, float]]:
    """Largest absolute error of each entry; at padding ``y`` and ``probs`` carry no meaning and are left out."""
    valid = content.get("valid", torch.ones(content["x"].shape[:2], dtype=torch.bool))
    for name, ours in run(content, backend).items():
        if name not in content:
            continue
        theirs = content[name]
        difference = (ours.double() - theirs.double()).abs()
        if name in ("y", "probs", "y_step"):
            difference = difference[valid]
        yield name, float(difference.max()) if difference.numel() else 0.0


def make(folder: Path) -> None:
    """Write one small causal and one bidirectional, padded file of our own."""
    common = {
        "kind": "seqboat_layer",
        "batch": 2,
        "length": 12,
        "dim": 6,
        "zdim": 4,
        "hdim": 8,
        "ndim": 3,
        "eval_mode": True,
    }
    causal = {
        "bidirectional": False,
        "window_size": 3,
        "norm_type": "layernorm",
        "prenorm": True,
        "rel_pos_bias": "rotary",
    }
    centred = {
        "bidirectional": True,
        "window_size": 2,
        "norm_type": "scalenorm",
        "prenorm": False,
        "rel_pos_bias": "simple",
    }
    rest = {"attention_activation": "softmax", "max_positions": 8, "truncation": None}
    folder.mkdir(parents=True, exist_ok=True)
    for name, meta in {
        "own_causal": common | causal | rest | {"local_pos": False},
        "own_bidirectional": common
        | centred
        | rest
        | {"local_pos": True, "attention_activation": "relu2", "truncation": 5},
    }.items():
        torch.manual_seed(0)
        layer = build_layer(meta)
        ours = {**{n: 0.3 * torch.randn_like(p) for n, p in layer.named_parameters()}, **dict(layer.named_buffers())}
        params = {theirs: ours[_translate(theirs, LAYER_RULES)] for theirs in _published_names(meta)}
        shape = (meta["batch"], meta["length"], meta["dim"])
        content: dict[str, Any] = {
            "x": torch.randn(shape, dtype=torch.float64),
            "grad_y": torch.randn(shape, dtype=torch.float64),
        }
        if meta["bidirectional"]:
            content["valid"] = torch.arange(meta["length"]) < torch.tensor([[meta["length"]], [7]])
            content["grad_y"] = content["grad_y"] * content["valid"][..., None]
        content |= (
            {f"param.{n}": p for n, p in params.items()} | {f"grad.{n}": p for n, p in params.items()} | {"meta": meta}
        )
        content |= run(content, "reference")
        arrays = {n: v.numpy() for n, v in content.items() if n != "meta"}
        np.savez(folder / f"{name}.npz", meta=np.array(json.dumps(meta)), **arrays)


def _published_names(meta: dict[str, Any]) -> list[str]:
    norm = ["norm.norm.scalar"] if meta["norm_type"] == "scalenorm" else ["norm.norm.weight", "norm.norm.bias"]
    linear = [f"{name}.{part}" for name in ("mx_proj", "hx_proj", "h_proj") for part in ("weight", "bias")]
    ema = [f"ssm.{name}" for name in ("delta", "alpha", "beta", "gamma", "omega")]
    bias = [] if meta["rel_pos_bias"] == "rotary" else ["rel_pos_bias.rel_pos_bias"]
    return [*norm, *linear, *ema, *bias, "gamma", "beta", "q_router.temp"]


def main(arguments: list[str]) -> int:
    """The command line."""
    if arguments[:1] == ["--make"] and len(arguments) == 2:
        make(Path(arguments[1]))
        return 0
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    worst = 0.0
    for path in map(Path, arguments):
        content = read(path)
        for backend in BACKENDS:
            found = dict(errors(content, backend))
            worst = max(worst, *(error if error == error else float("inf") for error in found.values()))
            print(f"{path.name} [{backend}] " + " ".join(f"{name} {error:.1e}" for name, error in found.items()))
    verdict = "ok" if worst <= TOLERANCE else "TOO LARGE"
    print(f"largest error {worst:.1e} (sma {sma.__version__}, torch {torch.__version__}): {verdict}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
