"""The suite of operations: every backend computes what the reference defines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sma.ops import Op
from sma.testing.base import Suite, law
from sma.testing.precision import differentiable, imprecision, known_to


@dataclass(frozen=True)
class OpCase:
    """Arguments of one call; floating-point tensors among them are differentiated."""

    name: str
    args: tuple[Any, ...]


class OpSuite(Suite):
    """The laws of an operation with several backends.

    Attributes:
        op: the operation.
        moves_data: True when the result holds input values only, so that backends must agree to the bit.
        tolerance: how far backends may differ in float64, relative to the largest value.

    Example:
        >>> class TestShift(OpSuite):                             # doctest: +SKIP
        ...     op = shift.OP
        ...     def cases(self):
        ...         yield OpCase("short", (torch.randn(2, 3, dtype=torch.float64), 1))
    """

    op: ClassVar[Op]
    moves_data: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-10
    compiles: ClassVar[bool] = True

    def cases(self) -> Iterator[OpCase]:
        """What to call it with, in float64: lengths 1 and 0, nothing active, everything active, 63, 100, 129."""
        raise NotImplementedError

    def backends(self, case: OpCase) -> list[str]:
        """The backends that can run a case, the reference aside."""
        reasons = self.op.explain(*case.args)
        return [name for name, reason in reasons.items() if reason is None and name != "reference"]

    def run(self, backend: str, args: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        """Output and the gradients of the differentiable arguments."""
        args = [a.detach().clone().requires_grad_() if differentiable(a) else a for a in args]
        out: Tensor = self.op.backends[backend].run(*args)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return out.detach(), list(torch.autograd.grad((out * weights).sum(), [a for a in args if differentiable(a)]))

    @law("one meaning")
    def test_backends_equal_the_reference(self) -> None:
        compared = 0
        for case in self.cases():
            expected, grads = self.run("reference", case.args)
            for backend in self.backends(case):
                out, other = self.run(backend, case.args)
                self._compare(f"{case.name}, {backend}", out, expected)
                for i, (one, two) in enumerate(zip(other, grads, strict=True)):
                    self._compare(f"{case.name}, {backend}, gradient {i}", one, two)
                compared += 1
        assert compared, "no backend but the reference could run any case"

    def _compare(self, what: str, actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape, what
        assert actual.dtype == expected.dtype, what
        if self.moves_data:
            assert torch.equal(actual, expected), what
        elif expected.numel():
            bound = self.tolerance * max(1.0, float(expected.abs().max()))
            assert float((actual - expected).abs().max()) <= bound, what

    @law("gradients")
    def test_gradcheck(self) -> None:
        for case in self.cases():
            for backend in ["reference", *self.backends(case)]:
                inputs = tuple(a.detach().clone().requires_grad_() for a in case.args if differentiable(a))
                if sum(a.numel() for a in inputs):
                    run = self._of_differentiable(backend, case)
                    assert torch.autograd.gradcheck(run, inputs, fast_mode=True), case.name

    def _of_differentiable(self, backend: str, case: OpCase) -> Callable[..., Tensor]:
        """The operation as a function of its differentiable arguments, as gradcheck flattens tuples."""

        def run(*inputs: Tensor) -> Tensor:
            given = iter(inputs)
            args = [next(given) if differentiable(a) else a for a in case.args]
            out: Tensor = self.op.backends[backend].run(*args)
            return out

        return run

    @law("low precision")
    def test_low_precision(self) -> None:
        """As precise as the reference in that precision (:mod:`sma.testing.precision`), the largest and the mean."""
        for case in self.cases():
            for dtype in (torch.float32, torch.bfloat16):
                args = tuple(a.to(dtype) if differentiable(a) else a for a in case.args)
                wide = [a.double() if differentiable(a) else a for a in args]
                exact = self.op.backends["reference"].run(*wide)
                (known,) = known_to(lambda args: [self.op.backends["reference"].run(*args)], [exact], wide)
                plain = self.op.backends["reference"].run(*args)
                for backend in self.backends(OpCase(case.name, args)):
                    mine = self.op.backends[backend].run(*args)
                    why = imprecision(mine, plain, exact, known, in_16_bits=dtype == torch.bfloat16)
                    assert why is None, f"{case.name}, {backend}, {dtype}: {why}"

    @law("determinism")
    def test_same_bits_twice(self) -> None:
        for case in self.cases():
            for backend in self.backends(case):
                (one, grads), (two, again) = self.run(backend, case.args), self.run(backend, case.args)
                assert torch.equal(one, two), case.name
                assert all(map(torch.equal, grads, again)), case.name

    @law("compiles", when="compiles")
    def test_compiles_in_one_graph(self) -> None:
        case = max(self.cases(), key=lambda case: sum(a.numel() for a in case.args if isinstance(a, Tensor)))
        torch._dynamo.reset()
        compiled: Callable[..., Tensor] = torch.compile(self.op, fullgraph=True, backend="aot_eager")
        expected: Tensor = self.op(*case.args)
        assert torch.equal(compiled(*case.args), expected)
