"""The memory of moving averages while they decode, and the coefficients derived from their parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sma.errors import StreamingError
from sma.steppers import SlotSpec
from sma_modules.ops.ema.decay import coefficients
from sma_modules.ops.ema.state import EMAState, compute_dtype
from sma_modules.ops.ema.types import EMAParameters


@dataclass(frozen=True)
class Coefficients:
    """Derived once from the parameters of an average, in the dtype that it is computed in.

    Attributes:
        loss: ``(D, N)``: what a state loses in a step, 1 - q.
        drive: ``(D, N)``: what an input adds.
        read: ``(D, N)``: what a state gives.
        leaving: ``(D, N)``: what is left of an input that leaves the window; None without truncation.
        omega: ``(D,)``: weight of the direct path.
    """

    loss: Tensor
    drive: Tensor
    read: Tensor
    leaving: Tensor | None
    omega: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, parameters: tuple[Tensor, Tensor, Tensor, Tensor], omega: Tensor, truncation: int | None
    ) -> Coefficients:
        """From the parameters delta, alpha, beta and gamma ``(D, N)``, and ``omega (D,)``."""
        dtype = compute_dtype(omega)
        own = coefficients(EMAParameters(*parameters, omega), dtype)
        leaving = None if truncation is None else own.drive * torch.exp(own.log_q * truncation)
        tensors = [own.loss, own.drive, own.read, leaving, omega.to(dtype)]
        return cls(*(None if each is None else each.contiguous().clone() for each in tensors))  # type: ignore[arg-type]

    def copy_(self, other: Coefficients) -> None:
        """Take the values of others, in place."""
        for name in ("loss", "drive", "read", "leaving", "omega"):
            own = getattr(self, name)
            if own is not None:
                own.copy_(getattr(other, name))


@dataclass(frozen=True)
class Averages:
    """The moving averages of S sequences. Row ``p % V`` is the state after p tokens, so V - 1 can be taken back.

    Attributes:
        hidden: ``(V, S, D, N)``.
        fresh: ``(V, S, D, N)``, and
        count: ``(V, S)`` int64: see :class:`~sma_modules.ops.ema.EMAState`; None without truncation, like
        history: ``(S, R, D)`` in the dtype of the tokens: the input at position p is in row ``p % R``; R = K + V - 1.
        truncation: K.
    """

    hidden: Tensor
    fresh: Tensor | None
    count: Tensor | None
    history: Tensor | None
    truncation: int | None

    @classmethod
    def empty(cls, spec: SlotSpec, dim: int, n_state: int, truncation: int | None) -> Averages:
        """Empty memory for the slots of ``spec``, ``dim`` channels and ``n_state`` averages."""
        dtype, device, versions = compute_dtype(spec.like), spec.like.device, spec.rollback + 1
        hidden = torch.zeros(versions, spec.slots, dim, n_state, dtype=dtype, device=device)
        if truncation is None:
            return cls(hidden, None, None, None, None)
        # One version more than of the states: every program of a kernel reads the count, one of them writes the next.
        count = torch.zeros(versions + 1, spec.slots, dtype=torch.int64, device=device)
        # Inputs come in the dtype of the tokens, so that is enough to keep them.
        history = torch.zeros(spec.slots, truncation + spec.rollback, dim, dtype=spec.like.dtype, device=device)
        return cls(hidden, torch.zeros_like(hidden), count, history, truncation)

    @property
    def versions(self) -> int:
        """V."""
        return self.hidden.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        """All of the memory."""
        return tuple(each for each in (self.hidden, self.fresh, self.count, self.history) if each is not None)

    def read(self, slots: Tensor, position: Tensor) -> EMAState:
        """The states of ``slots (n,)`` after ``position (n,)`` tokens."""
        version = position % self.versions
        hidden = self.hidden[version, slots]
        if self.fresh is None or self.count is None or self.history is None or self.truncation is None:
            return EMAState(hidden)
        row = self._rows(position)
        count = self.count[position % self.count.shape[0], slots]
        return EMAState(hidden, self.fresh[version, slots], count, self.history[slots[:, None], row])

    def write(self, slots: Tensor, state: object, position: Tensor) -> None:
        """Set the averages of ``slots (n,)``, which stand at ``position (n,)``, to those of ``state``.

        Raises:
            StreamingError: ``state`` is not one of such averages.
        """
        inner = tuple(self.hidden.shape[2:])
        wanted: dict[str, tuple[int, ...] | None] = {"hidden": inner, "fresh": None, "history": None}
        if self.history is not None:
            wanted |= {"fresh": inner, "history": (self.truncation or 0, self.history.shape[2])}
        for name, shape in wanted.items():
            value = getattr(state, name, None)
            found = tuple(value.shape[1:]) if isinstance(value, Tensor) else None
            if found != shape:
                raise StreamingError(f"EMA: rows of state.{name} must be {shape}, got {found}")
        assert isinstance(state, EMAState)
        self.hidden[position % self.versions, slots] = state.hidden.to(self.hidden)
        if self.fresh is None or self.count is None or self.history is None:
            return
        assert state.fresh is not None
        assert state.count is not None
        assert state.history is not None
        self.fresh[position % self.versions, slots] = state.fresh.to(self.fresh)
        self.count[position % self.count.shape[0], slots] = state.count.to(self.count)
        self.history[slots[:, None], self._rows(position)] = state.history.to(self.history)

    def _rows(self, position: Tensor) -> Tensor:
        """``(n, K)``: where the inputs of the last K tokens before ``position (n,)`` lie, newest last."""
        assert self.history is not None
        taps = self.truncation or 0
        return (position[:, None] - taps + torch.arange(taps, device=position.device)) % self.history.shape[1]
