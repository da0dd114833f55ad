"""Models as graphs of fixed shapes: a chunk of a prompt, a step of decoding, a whole sequence.

A graph computes in the dtype and on the device of the model: float32, bfloat16 or float16, on the CPU or on CUDA. It
holds operations of PyTorch only, so that it runs where this library is not.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sma.errors import ConfigError, ExportError, SMAError
from sma.interfaces import Model
from sma.ops import using
from sma.ops.backend import without_autocast
from sma.padding import valid_of
from sma.steppers import SlotSpec, StepContext
from sma_models.inference.fixed_capacity import why_not_fixed, with_fixed_rows
from sma_models.language_model import LanguageModel, ModelStepper
from sma_models.retrieval import Retrieval
from sma_models.stack import StackState, position_of

M = TypeVar("M", bound=Model)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Exported:
    """A part of a model as a graph.

    Attributes:
        program: the graph, as ``torch.export`` makes it. Its inputs are ``inputs``, flat and in this order.
        inputs: names of the inputs.
        outputs: names of the outputs.
        example: inputs that fit, by name. Those that begin with ``state.`` are the beginning of a stream.
        dynamic: whether the batch may be of any size.
    """

    program: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: dict[str, Tensor]
    dynamic: bool

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the inputs that are the state, in the order of :meth:`sma.state.State.named_tensors`."""
        return tuple(name for name in self.inputs if name.startswith(STATE))

    @property
    def device(self) -> torch.device:
        """The device of the model, of the inputs and of the outputs."""
        return self.example[self.inputs[0]].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the logits."""
        return next(iter(self.program.parameters())).dtype


STATE, NEXT = "state.", "next_state."


def export_prefill(model: Model, batch: int = 1, chunk: int = 256, *, capacity: float = 1.0) -> Exported:
    """The graph that prefills a chunk of prompts.

    Inputs are ``tokens (B, C)`` int64, ``lengths (B,)`` int64 of 0 to C (padding stands on the right and may hold
    anything) and the state before the chunk; outputs are ``logits (B, V)`` of what follows the last real token of each
    row, ``overflow ()`` int64, and the state after it. Rows of length 0 keep their state, and their logits mean
    nothing.

    Args:
        model: a language model in evaluation mode. It is left as it is.
        batch: how many prompts B.
        chunk: how many tokens C.
        capacity: of each layer that decides, as a share of the ``B * C`` tokens. The graph always computes so many
            rows; ``overflow`` counts the active tokens that are dropped for lack of capacity. 1 is exact.

    Raises:
        ConfigError: an argument is out of range, the model is no language model, in training mode, or not in one such
            dtype on one such device.
        StreamingError: the model cannot stream; the message says why.
        ExportError: a part of it cannot be exported; the message names it and says why.

    Example:
        >>> import sma
        >>> model = sma.build("seqboat_small_lm", "d_model=16", "n_layers=1").eval()
        >>> export_prefill(model, chunk=8).inputs[:3]
        ('tokens', 'lengths', 'state.layers.0.mixer.hidden')
    """
    language = _language_model(model)
    _check_sizes(capacity, batch=batch, chunk=chunk)
    fixed = _fixed(language, capacity)
    state = language.initial_state(batch)
    device = language.embedding.weight.device
    example = {
        "tokens": torch.zeros(batch, chunk, dtype=torch.int64, device=device),
        "lengths": torch.full((batch,), chunk, device=device),
        **_named(state),
    }
    return _trace(_Prefill(fixed, state), example, ("logits", "overflow"), "prefill", dynamic=False)


def export_step(model: Model, batch: int | None = None) -> Exported:
    """The graph of one decoding step.

    Inputs are ``tokens (B,)`` int64, ``live (B,)`` bool (the rows that take a token; the other rows do not change, and
    their logits mean nothing) and the state; outputs are ``logits (B, V)`` and the state after the token.

    Args:
        model: a language model in evaluation mode. It is left as it is.
        batch: how many sequences B; None makes a graph for any number.

    Raises:
        ConfigError: the batch is below 1, the model is no language model, in training mode, or not in one such dtype on
            one such device.
        StreamingError: the model cannot stream; the message says why.
        ExportError: a part of it cannot be exported; the message names it and says why.

    Example:
        >>> import sma
        >>> model = sma.build("seqboat_small_lm", "d_model=16", "n_layers=1").eval()
        >>> export_step(model).outputs[:2]
        ('logits', 'next_state.layers.0.mixer.hidden')
    """
    language = _language_model(model)
    if batch is not None:
        _check_sizes(batch=batch)
    size = batch or 2  # not 1, which a tracer takes for a constant
    fixed = _fixed(language, 1.0)
    state = language.initial_state(size)
    device = language.embedding.weight.device
    example = {
        "tokens": torch.zeros(size, dtype=torch.int64, device=device),
        "live": torch.ones(size, dtype=torch.bool, device=device),
        **_named(state),
    }
    return _trace(_Step(fixed, state), example, ("logits",), "step", dynamic=batch is None)


def export_forward(model: Model, batch: int = 1, length: int = 256, *, capacity: float = 1.0) -> Exported:
    """The graph of a model on whole sequences.

    Inputs are ``inputs (B, L)``, int64 tokens or real numbers in the dtype of the model, and ``lengths (B,)`` int64 of
    1 to L; of a model for pairs ``first``, ``first_lengths``, ``second`` and ``second_lengths``. Outputs are the
    ``logits`` and ``overflow ()``.

    Args:
        model: any model in evaluation mode. It is left as it is.
        batch: how many sequences B.
        length: how long they may be, L. Padding stands on the right and may hold anything.
        capacity: as for :func:`export_prefill`.

    Raises:
        ConfigError: an argument is out of range, or the model is in training mode or not in one such dtype on one such
            device.
        ExportError: a part of it cannot be exported; the message names it and says why.
    """
    weight = check_model(model)
    _check_sizes(capacity, batch=batch, length=length)
    tokens = getattr(model, "vocab_size", None) is not None
    inputs = torch.zeros(batch, length, dtype=torch.int64 if tokens else weight.dtype, device=weight.device)
    sides = ("first", "second") if isinstance(model, Retrieval) else ("inputs",)
    example: dict[str, Tensor] = {}
    for side in sides:
        example[side] = inputs.clone()
        lengths = torch.full((batch,), length, device=weight.device)
        example["lengths" if side == "inputs" else f"{side}_lengths"] = lengths
    return _trace(_Forward(_fixed(model, capacity)), example, ("logits", "overflow"), "forward", dynamic=False)


class _Prefill(nn.Module):
    """A chunk: tensors in, tensors out."""

    def __init__(self, model: LanguageModel, state: StackState) -> None:
        super().__init__()
        self.model = model
        self.initial = state

    def forward(self, tokens: Tensor, lengths: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        tokens = tokens.masked_fill(~valid_of(lengths, tokens), 0)
        out = model.stack(model.embed(tokens), _rebuilt(self.initial, state), lengths=lengths)
        last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, out.x.shape[2])
        logits = model.logits(out.x.gather(1, last).squeeze(1))
        assert out.state is not None
        return logits, _overflow(out.routings, lengths), *_copied(out.state.tensors(), state)


class _Step(nn.Module):
    """A step of decoding: a function of the state, instead of memory that changes in place."""

    def __init__(self, model: LanguageModel, state: StackState) -> None:
        super().__init__()
        self.model = model
        self.initial = state

    def forward(self, tokens: Tensor, live: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        given = _rebuilt(self.initial, state)
        slots, position = torch.arange(tokens.shape[0], device=tokens.device), position_of(given)
        stepper = ModelStepper(self.model, SlotSpec(tokens.shape[0], 0, self.model.embedding.weight.detach()))
        stepper.write(slots, given, position)
        logits, _ = stepper.step(tokens.masked_fill(~live, 0), StepContext(live, position))
        return logits, *_copied(stepper.read(slots, position + live).tensors(), state)


class _Forward(nn.Module):
    """Whole sequences."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.model, Retrieval):
            first, first_lengths, second, second_lengths = inputs
            out = self.model(first, second, lengths=(first_lengths, second_lengths))
        else:
            out = self.model(inputs[0], lengths=inputs[1])
        return out.logits, _overflow(out.routings, inputs[1])


def _rebuilt(initial: StackState, tensors: tuple[Tensor, ...]) -> StackState:
    """The state of these tensors."""
    given = iter(tensors)
    return initial.map(lambda _: next(given))


def _copied(after: tuple[Tensor, ...] | list[Tensor], before: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors after; a graph must not give back an input as its output."""
    return [each.clone() if any(each is one for one in before) else each for each in after]


def _overflow(routings: Any, like: Tensor) -> Tensor:
    """``()`` int64: active tokens of all layers that were dropped for lack of capacity."""
    total = like.new_zeros((), dtype=torch.int64)
    for routing in routings.values():
        total = total + routing.overflow.sum()
    return total


def _named(state: StackState) -> dict[str, Tensor]:
    return {STATE + name: tensor for name, tensor in state.named_tensors().items()}


def check_model(model: Model) -> Tensor:
    """A weight of a model that can be exported; all are in its dtype and on its device.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(model, Model):
        raise ConfigError(f"model: must be a model of this library, got {type(model).__name__}")
    if model.training:
        raise ConfigError("model: must be in evaluation mode to be exported, call model.eval() first")
    weights = dict(model.named_parameters())
    first, like = next(iter(weights.items()))
    if like.dtype not in DTYPES or like.device.type not in DEVICES:
        raise ConfigError(
            f"model: must be in float32, bfloat16 or float16 on the CPU or a CUDA device to be exported, {first} is "
            f"{like.dtype} on {like.device}"
        )
    for name, each in (*weights.items(), *model.named_buffers()):
        if each.device != like.device or (name in weights and each.dtype != like.dtype):
            raise ConfigError(
                f"model: must be in one dtype on one device to be exported, {first} is {like.dtype} on {like.device}, "
                f"{name} is {each.dtype} on {each.device}"
            )
    return like


def _language_model(model: Model) -> LanguageModel:
    check_model(model)
    if not isinstance(model, LanguageModel):
        raise ConfigError(f"model: must be a LanguageModel, got {type(model).__name__}; export_forward takes any")
    return model


def _check_sizes(capacity: float = 1.0, **sizes: int) -> None:
    if not 0 < capacity <= 1:
        raise ConfigError(f"capacity: must lie in (0, 1], got {capacity}")
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name}: must be at least 1, got {value}")


def _fixed(model: M, capacity: float) -> M:
    """The model with a fixed number of rows everywhere.

    Raises:
        ExportError: a layer has no rows of a fixed number.
    """
    for name, reason in why_not_fixed(model).items():
        raise ExportError(f"{name}: cannot be exported: {reason}")
    return with_fixed_rows(model, capacity)


def _trace(
    module: nn.Module, example: dict[str, Tensor], outputs: tuple[str, ...], what: str, *, dynamic: bool
) -> Exported:
    """The graph of a module of tensors.

    Raises:
        ExportError: something in it cannot be traced.
    """
    shapes: Any = None
    if dynamic:
        size = torch.export.Dim("batch", min=1, max=2**16)
        named = [{0: size} for _ in example]
        shapes = (named[0], named[1], tuple(named[2:]))
    module.eval()
    device = next(iter(example.values())).device
    # Other backends cannot run where the graph does: kernels of this library are not available there.
    with torch.no_grad(), without_autocast(device), using("eager"), _naming(module, what):
        program = torch.export.export(module, tuple(example.values()), dynamic_shapes=shapes)
    states = tuple(NEXT + name.removeprefix(STATE) for name in example if name.startswith(STATE))
    return Exported(program, tuple(example), outputs + states, example, dynamic)


@contextmanager
def _naming(module: nn.Module, what: str) -> Iterator[None]:
    """An error inside names the part of the module that was running."""
    try:
        yield
    except SMAError:
        raise
    except Exception as error:
        raise ExportError(f"{_place(error, module)}: cannot be exported ({what}): {_reason(error)}") from error


def _place(error: BaseException, module: nn.Module) -> str:
    """The innermost part of the module whose code an error comes from."""
    names = {id(part): name.removeprefix("model").lstrip(".") for name, part in module.named_modules()}
    place, one = "the model", cast("BaseException | None", error)
    while one is not None:
        for frame, _ in traceback.walk_tb(one.__traceback__):
            owner = frame.f_locals.get("self")
            if names.get(id(owner)):
                place = f"{names[id(owner)]} ({type(owner).__name__})"
        one = one.__cause__ or one.__context__
    return place


def _reason(error: Exception) -> str:
    """The first line that is not empty."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "data-dependent" in text:
        return f"its shapes or branches depend on values ({text})"
    return text
