"""The choice of experts: backends, kernels, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import ShapeError
from sma.ops import using
from sma.ops.kernel import why_not_triton
from sma.testing.precision import known_to
from sma_modules.ops.expert_routing import OP, choose_experts
from tests.kernels import Compilation, compile_all
from tests.ops.modules.kernel_checks import DEVICE, check_errors, guarded

with using("triton"):
    HERE = why_not_triton(torch.device(DEVICE))
needs_triton = pytest.mark.skipif(HERE is not None, reason=str(HERE))
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch.compile
]
# Tokens, experts, k, renormalise: none, one, more than a program takes, all experts, a single expert.
CASES = ((0, 3, 2, True), (1, 4, 2, True), (300, 8, 2, True), (33, 5, 1, False), (21, 6, 6, True), (9, 1, 1, False))


def numbers(tokens: int, experts: int) -> Tensor:
    return 2 * torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def run(backend: str, logits: Tensor, top_k: int, renormalise: bool) -> list[Tensor]:
    """The four results, and the gradient of the logits through each of the three that have one."""
    logits = logits.detach().clone().requires_grad_()
    with using(backend):
        choice = choose_experts(logits, top_k, renormalise)
        grads = []
        for out in (choice.weight, choice.probability, choice.square[None]):
            weight = torch.linspace(-1, 2, out.numel(), device=out.device, dtype=torch.bfloat16).view_as(out)
            grads.extend(torch.autograd.grad((out * weight.to(out.dtype)).sum(), logits, retain_graph=True))
    return [*(each.detach() for each in choice), *grads]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_equals_the_reference(case: Any) -> None:
    tokens, experts, top_k, renormalise = case
    logits = numbers(tokens, experts)
    for a, b in zip(
        run("eager", logits, top_k, renormalise), run("reference", logits, top_k, renormalise), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("renormalise", [False, True])
def test_gradcheck(renormalise: bool) -> None:
    logits = numbers(6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: choose_experts(logits, 2, renormalise)[1:], logits)


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_errs_no_more_than_eager(case: Any) -> None:
    tokens, experts, top_k, renormalise = case
    logits = numbers(tokens, experts).float().to(DEVICE)
    with guarded():
        mine = run("triton", logits, top_k, renormalise)

    def exactly(inputs: list[Tensor]) -> list[Tensor]:
        return run("eager", inputs[0], top_k, renormalise)[1:]

    exact = run("eager", logits.double(), top_k, renormalise)
    eager = run("eager", logits, top_k, renormalise)
    assert torch.equal(mine[0], exact[0])
    check_errors(mine[1:], eager[1:], exact[1:], known_to(exactly, exact[1:], [logits.double()]))
    assert all(map(torch.equal, mine, run("triton", logits, top_k, renormalise)))


@needs_triton
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_ties_and_values_that_are_not_finite() -> None:
    logits = torch.zeros(4, 5, device=DEVICE)
    logits[1, 3:] = 1.0
    logits[2] = float("nan")
    logits[3] = torch.tensor([-1e30, 1e30, 0.0, float("-inf"), 1e30])
    with using("triton"), guarded():
        choice = choose_experts(logits, 3, True)
    assert choice.expert[[0, 1, 3]].tolist() == [[0, 1, 2], [3, 4, 0], [1, 4, 0]]
    assert ((choice.expert >= 0) & (choice.expert < 5)).all()
    torch.testing.assert_close(choice.weight[3], torch.tensor([0.5, 0.5, 0.0], device=DEVICE))


@needs_triton
def test_operators_are_what_the_compiler_expects() -> None:
    from sma_modules.ops.expert_routing import launch as kernels

    logits = torch.randn(5, 4, device=DEVICE)
    expert, weight, probability, square = kernels.choose(logits, 2, True)
    for function, args in (
        (kernels.choose, (logits, 2, True)),
        (kernels.choose_backward, (logits, expert, weight, probability, square, True)),
    ):
        torch.library.opcheck(function.operator, args, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_compiles_in_one_graph() -> None:
    logits = torch.randn(7, 4, device=DEVICE, requires_grad=True)
    torch._dynamo.reset()
    with using("triton"):
        compiled = torch.compile(OP, fullgraph=True, backend="aot_eager")
        results = []
        for call in (OP, compiled):
            choice = call(logits, 2, True)
            # Some versions of the compiler lose the gradients of results that are views of one tensor.
            assert len({each.untyped_storage().data_ptr() for each in choice}) == len(choice)
            total = choice.weight.square().sum() + choice.probability.square().sum() + choice.square
            results.append([*choice, *torch.autograd.grad(total, logits)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("top_k", [0, 4])
def test_bad_input(top_k: int) -> None:
    with pytest.raises(ShapeError, match=rf"E at least top_k = {top_k} and that at least 1, got \(2, 3\)"):
        choose_experts(torch.zeros(2, 3), top_k, True)


def test_kernels_fit_an_h100() -> None:
    """Nothing spills with 8, 64 and 512 experts."""
    pytest.importorskip("triton")
    module, asked = "sma_modules.ops.expert_routing.triton_kernel", []
    signature = dict.fromkeys(("logits", "weight_out", "shares", "grad_weight", "grad_probability"), "*fp32")
    signature |= dict.fromkeys(("grad_square", "grad_logits"), "*fp32")
    signature |= {"expert_out": "*i64", "expert": "*i64", "n_tokens": "i32"}
    for experts in (8, 64, 512):
        constants = {"E": experts, "TOP_K": 8, "RENORMALISE": True, "E_PAD": experts, "BT": max(1024 // experts, 1)}
        asked.append(Compilation(module, "choose_kernel", signature, {**constants, "K_PAD": 8}, {"num_warps": 4}))
        asked.append(Compilation(module, "choose_backward_kernel", signature, constants, {"num_warps": 4}))
    for request, resources in zip(asked, compile_all(asked), strict=True):
        assert resources.spilled == 0, (request, resources)
