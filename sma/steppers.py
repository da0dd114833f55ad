"""Decoding: one token of every sequence at a time, with fixed shapes, in memory that stays where it is.

``forward(x, state)`` of the library is a function: states are values, chunks are of any length, and the number of rows
that a sparse module works on is read back from the device. That is right for a prefill and costs too much for single
tokens. A *stepper* is a part of a model with memory for S sequences ("slots"): :meth:`~MixerStepper.step` takes one
token of each and changes the stepper's own memory in place. It does not synchronise with the device and allocates
nothing that is kept, so a CUDA graph can hold it. States remain the format of exchange: :meth:`Stepper.write` puts one
into slots, :meth:`Stepper.read` gives it back.

Every part has a stepper, chosen by :mod:`sma.decode.choice`. The fallback calls the part, with a state that is a value;
:attr:`Stepper.uncaptured` says why no graph can hold that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sma.ops.row_norm import RowNorm, row_norm
from sma.state import State


class SlotSpec(NamedTuple):
    """What a stepper is built for.

    Attributes:
        slots: how many sequences S.
        rollback: how many tokens can be taken back.
        like: a tensor on the device and in the dtype of the tokens.
    """

    slots: int
    rollback: int
    like: Tensor


class StepContext(NamedTuple):
    """The position of every sequence when a step begins.

    Attributes:
        live: ``(S,)`` bool: the slots that take a token. Nothing is changed in the others, and what comes out is
            meaningless there, but finite.
        position: ``(S,)`` int64: real tokens before this one. Memory that can be taken back is kept by position, so
            taking tokens back only makes the position smaller.
    """

    live: Tensor
    position: Tensor


class Decision(NamedTuple):
    """Which modules were active in a step, ``(S, M)`` bool, and with which confidence ``(S, M)``."""

    active: Tensor
    confidence: Tensor


class Stepper:
    """The memory of S sequences in one part of a model.

    Attributes:
        uncaptured: why a CUDA graph cannot hold the step, None where it can.
    """

    uncaptured: str | None = None

    def parts(self) -> dict[str, Stepper]:
        """The steppers inside, by name."""
        return {}

    def memory(self) -> tuple[Tensor, ...]:
        """The tensors that the stepper itself keeps."""
        return ()

    def why_uncaptured(self) -> dict[str, str]:
        """By the name of each part that no graph can hold, the reason."""
        return {name: part.uncaptured for name, part in self.walk() if part.uncaptured is not None}

    def walk(self, name: str = "") -> Iterator[tuple[str, Stepper]]:
        """This stepper and those inside, with their dotted names."""
        yield name, self
        for own, part in self.parts().items():
            yield from part.walk(f"{name}.{own}" if name else own)

    def read(self, slots: Tensor, position: Tensor) -> State | None:
        """The state of ``slots (n,)``, as ``forward`` takes it; ``position (n,)`` tokens of each went by."""
        raise NotImplementedError

    def write(self, slots: Tensor, state: State | None, position: Tensor) -> None:
        """Make the n sequences of ``state`` those of ``slots (n,)``, from ``position (n,)`` on."""
        raise NotImplementedError

    def rolled_back(self, slot: int, tokens: int) -> None:
        """Take back the last ``tokens`` of a slot. Memory that is kept by position needs no change."""
        for part in self.parts().values():
            part.rolled_back(slot, tokens)

    def refresh(self) -> None:
        """Compute anew what was derived from weights."""
        for part in self.parts().values():
            part.refresh()


class MixerStepper(Stepper):
    """A mixer that decodes."""

    def step(self, x: Tensor, context: StepContext) -> Tensor:
        """``x (S, D)``, a token of every slot, to ``(S, D)``."""
        raise NotImplementedError

    def activated(self, x: Tensor, context: StepContext, norm: RowNorm | None = None) -> Tensor:
        """``SiLU(step(norm(x)))``. A mixer that can do it in one pass overrides this."""
        return F.silu(self.step(x if norm is None else row_norm(x, norm), context))


class ModuleStepper(Stepper):
    """An activatable module that decodes.

    Attributes:
        d_out: width of the outputs, of a stepper that has an ``idle``; None for one that always steps.
    """

    d_out: int | None = None

    def step(self, x: Tensor, active: Tensor, context: StepContext) -> Tensor:
        """Outputs ``(S, D)`` for ``x (S, D)``; rows that are not ``active (S,)`` hold anything finite."""
        raise NotImplementedError

    def idle(self, context: StepContext) -> None:
        """Instead of ``step`` where no slot is known to be active: for what is kept by position."""


class ActivatedStepper(Stepper):
    """A sparsely activated layer that decodes."""

    def step(self, x: Tensor, context: StepContext, logits: Tensor | None = None) -> tuple[Tensor, Decision]:
        """The layer on ``x (S, D)``.

        Args:
            x: a token of every slot.
            context: the position of the slots.
            logits: ``(S, M * logits_per_module)``, instead of the layer's own router.

        Returns:
            ``sum_m confidence * f_m(x)`` over the active modules ``(S, D)``, and the decision.
        """
        raise NotImplementedError


class Stepped(NamedTuple):
    """What a block returns: ``x (S, D)``, and the decisions of its layers by name."""

    x: Tensor
    decisions: dict[str, Decision]


class BlockStepper(Stepper):
    """A block that decodes."""

    def step(self, x: Tensor, context: StepContext) -> Stepped:
        """``x (S, D)``, a token of every slot, through the block."""
        raise NotImplementedError


def normalised(norm: nn.Module | None, x: Tensor) -> Tensor:
    """A norm of ``(B, L, D)`` on ``x (S, D)``."""
    if norm is None:
        return x
    out: Tensor = norm(x[:, None]).squeeze(1)
    return out


def choose(live: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` in the rows that are ``live (S,)``, ``old`` in the others."""
    return torch.where(live.view(-1, *(1,) * (new.dim() - 1)), new, old)
