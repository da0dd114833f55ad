"""Check golden files: inputs, weights, outputs and gradients in float64 that an implementation has to reproduce.

    python tests/golden.py FILE...            # prints the largest errors per file and backend
    python tests/golden.py --make FOLDER      # writes small files of our own, computed by the reference backend

Exit code 0 when every error is at most 1e-9, 1 when one is larger, 2 when a file cannot be checked.

A file holds ``x, y, grad_y, grad_x`` (B, L, D), ``valid`` (B, L) where there is padding, ``param.*`` and ``grad.*``
under the names of the published SeqBoat code, and ``meta``, a JSON string with the sizes and options.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sma
from sma.configurators import TemperedSoftmax
from sma.errors import BackendError, SMAError
from sma.layer import ActivatedConfig
from sma.ops import using
from sma.padding import Alignment
from sma_models.integrations.convert import LAYER_RULES, convert_layer, translate
from sma_models.seqboat import SeqBoat
from sma_modules.mixers.ema import EMA
from sma_modules.modules.gau import GAU
from sma_modules.norms import BatchNorm, LayerNorm, RMSNorm, ScaleNorm, SyncBatchNorm

TOLERANCE = 1e-9
BACKENDS = ("reference", "eager")
NORMS = {
    "layernorm": LayerNorm,
    "batchnorm": BatchNorm,
    "syncbatchnorm": SyncBatchNorm,
    "scalenorm": ScaleNorm,
    "rmsnorm": RMSNorm,
}
# What `meta` may say: the value that stands for a missing entry, or REQUIRED.
REQUIRED = object()
SIZES = {"kind": REQUIRED, "dim": REQUIRED, "ndim": REQUIRED, "bidirectional": REQUIRED, "truncation": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "md_ema": SIZES,
    "seqboat_layer": SIZES
    | {
        "zdim": REQUIRED,
        "hdim": REQUIRED,
        "window_size": REQUIRED,
        "norm_type": "layernorm",
        "prenorm": True,
        "rel_pos_bias": "simple",
        "local_pos": False,
        "attention_activation": "softmax",
        "max_positions": 1024,
        "eval_mode": True,
    },
}
REMARKS = {"batch", "length", "seed", "dtype", "torch", "note", "description", "init_temp"}
"""Entries of ``meta`` that say nothing that the arrays do not."""
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
WITHOUT_MEANING_AT_PADDING = ("y", "probs", "y_step")


class GoldenError(Exception):
    """A file is not of the format, or asks for what the library does not have."""


def read(path: Path) -> dict[str, Any]:
    """Tensors by name, and ``meta`` as a dictionary with its defaults filled in.

    Raises:
        GoldenError: the file cannot be read or is not of the format.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            content: dict[str, Any] = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
            content["meta"] = json.loads(str(file["meta"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise GoldenError(f"must be a golden file (.npz with meta): {error}") from error
    for name in ("x", "y", "grad_y", "grad_x"):
        if name not in content:
            raise GoldenError(f"{name}: must be in the file")
        if content[name].dim() != 3 or content[name].shape != content["x"].shape:
            raise GoldenError(f"{name}: must be (B, L, D) like x, got {tuple(content[name].shape)}")
    content["meta"] = check_meta(content["meta"])
    if content["x"].shape[2] != content["meta"]["dim"]:
        raise GoldenError(f"x: must have meta.dim = {content['meta']['dim']} features, got {content['x'].shape[2]}")
    if "valid" in content:
        content["valid"] = content["valid"].bool()
    return content


def check_meta(meta: Any) -> dict[str, Any]:
    """The options with their defaults.

    Raises:
        GoldenError: an option is missing, unknown, or has a value that the library does not have.
    """
    kind = meta.get("kind") if isinstance(meta, dict) else None
    if kind not in OPTIONS:
        raise GoldenError(f"meta.kind: must be one of {', '.join(OPTIONS)}, got {kind!r}")
    known = OPTIONS[kind]
    for name in meta:
        if name not in known and name not in REMARKS:
            raise GoldenError(f"meta.{name}: unknown option of {kind}; there are {', '.join(known)}")
    full = {name: meta.get(name, default) for name, default in known.items()} | {
        name: meta[name] for name in meta if name in REMARKS
    }
    for name, value in full.items():
        if value is REQUIRED:
            raise GoldenError(f"meta.{name}: must be given for {kind}")
    choices = {"norm_type": tuple(NORMS), "rel_pos_bias": ("simple", "rotary")}
    for name, allowed in choices.items():
        if name in full and full[name] not in allowed:
            raise GoldenError(f"meta.{name}: must be one of {', '.join(allowed)}, got {full[name]!r}")
    return full


def part(content: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """The entries below ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}


def build_layer(meta: dict[str, Any], affine: bool = True) -> nn.Module:
    """The module that a golden file describes, in float64; in evaluation mode unless it says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ema = EMA.Config(n_state=meta["ndim"], truncation=meta["truncation"])
        if meta["kind"] == "md_ema":
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
            mixer=ema,
            activate=ActivatedConfig(module=gau, configurator=TemperedSoftmax.Config()),
            norm=NORMS[meta["norm_type"]].Config(affine=affine),
            prenorm=meta["prenorm"],
        )
        return config.build(d_model=meta["dim"], causal=not meta["bidirectional"]).train(not meta["eval_mode"])
    finally:
        torch.set_default_dtype(before)


def placed(content: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The content on a device, its real numbers in another dtype."""

    def moved(value: Any) -> Any:
        return value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in content.items()}


def run(content: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Everything that a golden file can hold, as computed by a backend, under the file's names.

    Where the content lies it is computed, and in its dtype.
    """
    params = part(content, "param.")
    is_ema = content["meta"]["kind"] == "md_ema"
    layer = build_layer(content["meta"], any(name in params for name in ("norm.norm.weight", "norm.norm.scalar")))
    layer.load_state_dict(params if is_ema else convert_layer(params))
    layer.to(content["x"].device, content["x"].dtype)
    x = content["x"].clone().requires_grad_()
    alignment = Alignment.of(content.get("valid"), tuple(x.shape[:2]))
    result: dict[str, Tensor] = {}
    with using(backend):
        if is_ema:
            y, _ = layer(alignment.align(x), lengths=alignment.lengths)
        else:
            out = layer(alignment.align(x), lengths=alignment.lengths)
            y, routing = out.x, out.routings["activate"]
            confidence = alignment.restore(routing.confidence[..., 0]).detach()
            result["active"] = alignment.restore(routing.active[..., 0])
            result["probs"] = torch.stack([1 - confidence, confidence], -1)
        y = alignment.restore(y)
        y.backward(content["grad_y"])
        if "y_step" in content:
            result["y_step"], result["state_last"] = _steps(layer, content["x"])
    result["y"] = y.detach()
    result["grad_x"] = x.grad
    parameters = dict(layer.named_parameters())
    for name in part(content, "grad."):
        ours = name if is_ema else translate(name, LAYER_RULES)
        if ours not in parameters:
            raise GoldenError(f"grad.{name}: not a parameter of this layer")
        grad = parameters[ours].grad
        result[f"grad.{name}"] = torch.zeros_like(parameters[ours]) if grad is None else grad
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
    """Largest absolute error of each entry; at padding ``y`` and ``probs`` carry no meaning and are left out.

    Raises:
        GoldenError: the weights or options are not those of a layer that can be built, or an entry has another shape.
        BackendError: the backend cannot run this input.
    """
    valid = content.get("valid", torch.ones(content["x"].shape[:2], dtype=torch.bool, device=content["x"].device))
    try:
        result = run(content, backend)
    except BackendError:
        raise
    except (SMAError, RuntimeError, TypeError) as error:
        raise GoldenError(f"cannot be computed by {backend}: {error}") from error
    for name, ours in result.items():
        if name not in content:
            continue
        theirs = content[name]
        if ours.shape != theirs.shape:
            raise GoldenError(f"{name}: must be {tuple(ours.shape)}, got {tuple(theirs.shape)}")
        difference = (ours.double() - theirs.double()).abs()
        if name in WITHOUT_MEANING_AT_PADDING:
            difference = difference[valid]
        worst = float(difference.max()) if difference.numel() else 0.0
        yield name, worst if worst == worst else float("inf")


COMMON = {"batch": 2, "length": 14, "dim": 6, "zdim": 4, "hdim": 8, "ndim": 3, "window_size": 3, "max_positions": 8}
LAYERS: dict[str, dict[str, Any]] = {
    "own_causal_rotary": {"bidirectional": False, "prenorm": True, "norm_type": "layernorm", "rel_pos_bias": "rotary"},
    "own_causal_laplace_rmsnorm": {
        "bidirectional": False,
        "prenorm": False,
        "norm_type": "rmsnorm",
        "attention_activation": "laplace",
        "truncation": 4,
    },
    "own_bidirectional_local_scalenorm_padded": {
        "bidirectional": True,
        "prenorm": False,
        "norm_type": "scalenorm",
        "local_pos": True,
        "truncation": 5,
    },
    "own_bidirectional_relu2_batchnorm_left_padded": {
        "bidirectional": True,
        "prenorm": True,
        "norm_type": "batchnorm",
        "attention_activation": "relu2",
    },
}


def make(folder: Path) -> None:
    """Write small files of our own: every norm, attention function and kind of position, padding on either side."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, options in LAYERS.items():
        meta = check_meta({"kind": "seqboat_layer"} | COMMON | options)
        _write(folder / f"{name}.npz", meta, name)
    meta = check_meta({"kind": "md_ema", "bidirectional": False} | {n: COMMON[n] for n in ("dim", "ndim")})
    _write(folder / "own_ema_causal.npz", meta, "own_ema")


def _write(path: Path, meta: dict[str, Any], name: str) -> None:
    for seed in itertools.count():
        content = draw(meta, name, seed)
        active = content.get("active")
        valid = content.get("valid", torch.ones(content["x"].shape[:2], dtype=torch.bool))
        # Where hardly any or almost all tokens are active, little is checked.
        if active is None or bool(((active.sum(1) / valid.sum(1) - 0.5).abs() < 0.25).all()):
            break
    arrays = {n: v.numpy() for n, v in content.items() if n != "meta"}
    np.savez_compressed(path, meta=np.array(json.dumps(meta | {"seed": seed})), **arrays)


def draw(meta: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """The content of a file with random weights; the name says whether it is ``padded``, or ``left`` padded."""
    layer = build_layer(meta)
    torch.manual_seed(seed)  # here, as versions of torch draw initial weights differently
    buffers = dict(layer.named_buffers())
    ours = {n: 0.3 * torch.randn_like(p) for n, p in layer.named_parameters()} | buffers
    names = _published_names(meta)
    shape = (COMMON["batch"], COMMON["length"], meta["dim"])
    content: dict[str, Any] = {n: torch.randn(shape, dtype=torch.float64) for n in ("x", "grad_y")}
    if "padded" in name:
        valid = torch.arange(shape[1]) < torch.tensor([[shape[1]], [7]])
        content["valid"] = valid.flip(1) if "left" in name else valid
        content["grad_y"] = content["grad_y"] * content["valid"][..., None]
    if meta["kind"] == "md_ema":
        content["y_step"] = content["x"]
    content |= {f"param.{theirs}": ours[here] for theirs, here in names.items()} | {"meta": meta}
    content |= {f"grad.{theirs}": ours[here] for theirs, here in names.items() if here not in buffers}
    return content | run(content, "reference")


def _published_names(meta: dict[str, Any]) -> dict[str, str]:
    """Our name of each published one."""
    ema = ("delta", "alpha", "beta", "gamma", "omega")
    if meta["kind"] == "md_ema":
        return {name: name for name in ema}
    norms = {
        "scalenorm": ("scalar",),
        "rmsnorm": ("weight",),
        "batchnorm": BATCH_NORM,
        "syncbatchnorm": BATCH_NORM,
    }
    names = [f"norm.norm.{name}" for name in norms.get(meta["norm_type"], ("weight", "bias"))]
    names += [f"{name}.{end}" for name in ("mx_proj", "hx_proj", "h_proj") for end in ("weight", "bias")]
    names += [f"ssm.{name}" for name in ema] + ["gamma", "beta", "q_router.temp"]
    names += [] if meta["rel_pos_bias"] == "rotary" else ["rel_pos_bias.rel_pos_bias"]
    return {name: translate(name, LAYER_RULES) or name for name in names}


def backends() -> tuple[str, ...]:
    """The backends that can be checked here."""
    return BACKENDS + (("torch_scatter",) if importlib.util.find_spec("torch_scatter") else ())


def check(path: Path) -> float:
    """Print the errors of a file, a line for each backend, and return the largest."""
    content = read(path)
    worst = 0.0
    for backend in backends():
        try:
            found = dict(errors(content, backend))
        except BackendError as reason:  # never of the first two, which run everything
            print(f"{path.name} [{backend}] not checked: {reason}")
            continue
        worst = max(worst, *found.values())
        print(f"{path.name} [{backend}] " + " ".join(f"{name} {error:.1e}" for name, error in found.items()))
    return worst


def main(arguments: list[str]) -> int:
    """The command line."""
    if arguments[:1] == ["--make"] and len(arguments) == 2:
        make(Path(arguments[1]))
        return 0
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    worst, unusable = 0.0, 0
    for path in map(Path, arguments):
        try:
            worst = max(worst, check(path))
        except GoldenError as error:
            unusable += 1
            print(f"{path}: {error}", file=sys.stderr)
    verdict = "ok" if worst <= TOLERANCE else "TOO LARGE"
    if unusable:
        verdict += f"; {unusable} of {len(arguments)} files could not be checked"
    print(f"largest error {worst:.1e} (sma {sma.__version__}, torch {torch.__version__}): {verdict}")
    return 1 if worst > TOLERANCE else 2 if unusable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
