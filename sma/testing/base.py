"""What every suite shares: how a component is built and called, and rows of unequal length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.routing import Routing
from sma.state import State

SIDES = ("right", "left", "scattered")
few = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
"""Settings of the drawn examples, few, small enough to read as they are, and the same every time."""

lengths_of_rows = st.lists(st.integers(0, 7), min_size=1, max_size=4)
Test = TypeVar("Test", bound=Callable[..., None])


def law(name: str, *, when: str | None = None) -> Callable[[Test], Test]:
    """Mark a test method as a check of the law ``name``; it is left out of suites whose attribute ``when`` is false."""

    def mark(test: Test) -> Test:
        test.law = name  # type: ignore[attr-defined]
        test.when = when  # type: ignore[attr-defined]
        return test

    return mark


@dataclass(frozen=True)
class Result:
    """What a call gave, in the form of every kind: ``y (B, L, ...)``, or ``(B, ...)`` when sequences are pooled."""

    y: Tensor
    state: State | None = None
    routings: Mapping[str, Routing] = field(default_factory=dict)
    losses: Mapping[str, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        """A scalar that depends on every output and loss, with different weights."""
        weights = torch.linspace(0.5, 1.5, self.y.numel(), dtype=self.y.dtype).view_as(self.y)
        return (self.y * weights).sum() + sum(self.losses.values(), self.y.new_zeros(()))


class Suite:
    """Leaves out the laws whose condition (``when``) the class does not meet."""

    component: ClassVar[str] = ""
    """Name in reports; the name of the class by default."""

    own_laws: ClassVar[dict[str, Callable[..., None] | None]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.component = cls.__dict__.get("component") or cls.__name__
        cls.own_laws = {name: value for name, value in vars(cls).items() if name.startswith("test_")}
        laws: dict[str, Callable[..., None] | None] = {}
        for base in reversed(cls.__mro__):
            laws.update(base.__dict__.get("own_laws", {}))
        for name, test in laws.items():
            when = getattr(test, "when", None)
            setattr(cls, name, test if when is None or getattr(cls, when) else None)


class SequenceSuite(Suite):
    """Base of the suites over components that map sequences to sequences.

    Attributes:
        d_model: width of the tokens.
        causal: whether the component is built to be causal.
        streams: whether it can run chunk by chunk.
        in_place: whether what streams has a stepper.
        routes: whether it takes decisions, that is, whether ``Result.routings`` is not empty.
        sides: where padding may lie: ``right``, ``left``, ``scattered``.
        per_token: False when the output is one vector for each sequence.
        shortest: the shortest sequence that is accepted.
        memory: after so many tokens the state has its full size.
        tolerance: how far two ways to compute the same may differ, in float64.
        perturbation: standard deviation of the noise added to every parameter, so that no zero hides a mistake.
        modes: in which low-precision modes it has to work.
    """

    d_model: ClassVar[int] = 8
    causal: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    routes: ClassVar[bool] = True
    sides: ClassVar[Sequence[str]] = SIDES
    real_input: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    shortest: ClassVar[int] = 0
    memory: ClassVar[int] = 16
    tolerance: ClassVar[float] = 1e-9
    perturbation: ClassVar[float] = 0.1
    refuses_to_stream: ClassVar[bool] = True
    in_place: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        cls.refuses_to_stream = not cls.streams
        cls.real_and_causal = cls.causal and cls.real_input and cls.per_token
        cls.tokens_are_causal = cls.causal and cls.per_token
        cls.decodes = cls.streams and cls.in_place
        super().__init_subclass__(**kwargs)

    real_and_causal: ClassVar[bool] = False
    tokens_are_causal: ClassVar[bool] = False
    decodes: ClassVar[bool] = False

    # Methods that an author may override.

    def build(self) -> nn.Module:
        """A new instance of what is tested."""
        raise NotImplementedError

    def call(
        self,
        module: nn.Module,
        x: Tensor,
        state: State | None = None,
        *,
        valid: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> Result:
        """Call ``module`` in the way of its kind."""
        raise NotImplementedError

    def start(self, module: nn.Module, batch: int, like: Tensor) -> State | None:
        """The state before the first token."""
        state: State | None = module.initial_state(batch, like)  # type: ignore[operator]
        return state

    def inputs(self, *shape: int) -> Tensor:
        """Random input of ``shape`` (B, L)."""
        return torch.randn(*shape, self.d_model, dtype=torch.float64)

    def garbage(self, x: Tensor) -> Tensor:
        """Values at padded positions: large, but finite."""
        return torch.full_like(x, 1e3) * torch.randn_like(x)

    # The parts of the laws.

    def module(self, seed: int = 0) -> Any:
        """An instance in float64 and evaluation mode, with its parameters perturbed."""
        torch.manual_seed(seed)
        module = self.build().double().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=self.perturbation)
        return module

    def rows(self, lengths: Sequence[int]) -> list[Tensor]:
        """One random sequence of each length."""
        torch.manual_seed(1)
        return [self.inputs(1, max(length, self.shortest))[0] for length in lengths]

    def side(self, wanted: str) -> str:
        """``wanted``, or another side when the component does not take that one."""
        return wanted if wanted in self.sides else self.sides[0]

    def pad(self, rows: Sequence[Tensor], side: str = "right", extra: int = 0) -> tuple[Tensor, Tensor]:
        """Rows with garbage between, and its ``valid (B, L)``; ``extra`` more columns than the longest row."""
        width = max((len(row) for row in rows), default=0) + extra
        x = self.garbage(self.inputs(len(rows), width))
        valid = torch.zeros(len(rows), width, dtype=torch.bool)
        for b, row in enumerate(rows):
            n = len(row)
            columns = {"right": torch.arange(n), "left": torch.arange(width - n, width)}.get(side)
            columns = torch.randperm(width)[:n].sort().values if columns is None else columns
            x[b, columns] = row
            valid[b, columns] = True
        return x, valid

    def alone(self, module: nn.Module, rows: Sequence[Tensor]) -> list[Result]:
        """Each row by itself, without any padding."""
        return [self.call(module, row[None]) for row in rows]

    def assert_rows_agree(self, result: Result, valid: Tensor, expected: Sequence[Result]) -> None:
        """Each row of a padded batch is what it is alone: the output and the decisions."""
        for b, alone in enumerate(expected):
            y = result.y[b, valid[b]] if self.per_token else result.y[b]
            self.assert_close(y, alone.y[0], f"row {b}")
            for name, routing in alone.routings.items():
                same = torch.equal(result.routings[name].active[b, valid[b]], routing.active[0])
                assert same, f"row {b}: the decisions {name!r} depend on the rest of the batch"

    def assert_close(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Equal up to :attr:`tolerance`, relative to the largest value."""
        assert actual.shape == expected.shape, f"{what}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
        if expected.numel():
            actual, expected = actual.detach(), expected.detach()
            assert actual.isfinite().all(), f"{what}: not finite"
            error = float((actual - expected).abs().max())
            bound = self.tolerance * max(1.0, float(expected.abs().max()))
            assert error <= bound, f"{what}: differs by {error:.2e}, more than {bound:.2e}"


def gradients(output: Tensor, module: nn.Module, *inputs: Tensor) -> dict[str, Tensor | None]:
    """The gradient of every parameter and input, None where the graph does not reach it."""
    names = [name for name, _ in module.named_parameters()] + [f"input {i}" for i in range(len(inputs))]
    if not names or not output.requires_grad:
        return dict.fromkeys(names)
    values = torch.autograd.grad(output, [*module.parameters(), *inputs], allow_unused=True)
    return dict(zip(names, values, strict=True))


def leaves(output: Tensor) -> set[int]:
    """The leaves that the autograd graph of ``output`` reaches, by their ``id``."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        waiting.extend(before for before, _ in node.next_functions)
    return found


def with_decision(routings: Mapping[str, Routing], decide: Callable[[Routing], Tensor]) -> dict[str, Routing]:
    """The same routings with the decision ``decide(routing) (B, L, M)``, to be replayed."""
    return {
        name: Routing(decide(r) & r.valid[..., None], r.confidence.detach(), r.valid, r.position)
        for name, r in routings.items()
    }


def nothing(routing: Routing) -> Tensor:
    """No token activates any module."""
    return torch.zeros_like(routing.active)


def everything(routing: Routing) -> Tensor:
    """Every real token activates every module."""
    return torch.ones_like(routing.active)


def cuts(length: int) -> Iterator[list[int]]:
    """Every way to cut a sequence in two, and the way to cut it into single tokens."""
    yield from ([k, length - k] for k in range(length + 1))
    yield [1] * length
