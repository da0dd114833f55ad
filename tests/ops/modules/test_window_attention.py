"""Window attention: the eager backend against the definition, and properties of the definition."""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sma.errors import ConfigError, ShapeError
from sma.ops.backend import using
from sma_modules.ops.window_attention import tiling, window_attention
from sma_modules.ops.window_attention.products import fixed_point_sums

RULES = [
    (activation, bias, causal, window, chunk)
    for activation, bias, causal, window, chunk in itertools.product(
        ("softmax", "relu2", "laplace"), ("none", "original", "local"), (False, True), (None, 3), (None, 4)
    )
    if bias != "local" or window is not None
]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def problem(
    q_lengths: list[int],
    front: list[int] | None,
    rule: tuple[Any, ...],
    heads: int = 1,
    dtype: torch.dtype = torch.float64,
    entries: int = 9,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Random inputs; ``front`` keys stand before the first query of each sequence, None for aligned sequences."""
    activation, bias, causal, window, chunk = rule
    k_lengths = q_lengths if front is None else [max(n + m, 0) for n, m in zip(q_lengths, front, strict=True)]
    q_cu = cumulative(q_lengths)
    k_cu = q_cu if front is None else cumulative(k_lengths)
    sizes = [(sum(q_lengths), heads, 3), (sum(k_lengths), heads, 3), (sum(k_lengths), heads, 2)]
    if bias != "none":
        sizes.append((6 * window - 1 if bias == "local" else entries,))  # type: ignore[arg-type]
    tensors = [torch.randn(*size, dtype=dtype, requires_grad=True) for size in sizes]
    k_position = torch.randint(0, 4, (sum(k_lengths),)).cumsum(0)
    q_position = k_position if front is None else torch.randint(0, 4, (sum(q_lengths),)).cumsum(0)
    options = {
        "q_cu": q_cu,
        "k_cu": k_cu,
        "k_start": None if front is None else torch.arange(len(q_lengths)) * 3,
        "q_position": q_position,
        "k_position": k_position,
        "max_q": max(q_lengths, default=0),
        "max_k": max(k_lengths, default=0) + 1,  # an upper bound, not the maximum
        "activation": activation,
        "bias": bias,
        "causal": causal,
        "window": window,
        "chunk": chunk,
    }
    return tensors, options


def attend(tensors: list[Tensor], options: dict[str, Any], backend: str = "eager") -> Tensor:
    table = tensors[3] if len(tensors) > 3 else None
    with using(backend):
        return window_attention(*tensors[:3], bias_table=table, **options)


def both_agree(tensors: list[Tensor], options: dict[str, Any]) -> None:
    """Output and every gradient, to 1e-10."""
    results = []
    weight = torch.randn(tensors[0].shape[0], *tensors[2].shape[1:], dtype=torch.float64)
    for backend in ("eager", "reference"):
        y = attend(tensors, options, backend)
        results.append([y, *torch.autograd.grad((y * weight).sum(), tensors)])
    for ours, definition in zip(*results, strict=True):
        torch.testing.assert_close(ours, definition, rtol=0, atol=1e-10)


LENGTHS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 5, 11]), st.integers(0, 4)), min_size=1, max_size=3)


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=4)
@given(lengths=LENGTHS, aligned=st.booleans(), heads=st.integers(1, 2), block=st.sampled_from([1, 3, 16]))
def test_equals_reference(
    rule: tuple[Any, ...], lengths: list[tuple[int, int]], aligned: bool, heads: int, block: int
) -> None:
    front = None if aligned else [more for _, more in lengths]
    tensors, options = problem([n for n, _ in lengths], front, rule, heads)
    with mock.patch.object(tiling, "block_size", return_value=block):
        both_agree(tensors, options)


@pytest.mark.parametrize("rule", [("softmax", "original", True, 5, None), ("relu2", "local", False, 5, None)], ids=str)
def test_equals_reference_at_lengths_around_the_blocks(rule: tuple[Any, ...]) -> None:
    both_agree(*problem([63, 0, 100, 1, 129], None, rule))
    both_agree(*problem([63, 0, 100], [2, 7, 0], rule))


@pytest.mark.parametrize("rule", RULES[::7], ids=str)
def test_gradcheck(rule: tuple[Any, ...]) -> None:
    tensors, options = problem([5, 0, 2], [1, 2, 0], rule)
    with mock.patch.object(tiling, "block_size", return_value=2):
        assert torch.autograd.gradcheck(lambda *inputs: attend(list(inputs), options), tensors)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize(("n_queries", "front"), [(0, 0), (0, 3), (2, -2)])
def test_nothing_to_attend_to_gives_zeros_on_the_graph(backend: str, n_queries: int, front: int) -> None:
    tensors, options = problem([n_queries], [front], ("softmax", "original", True, 3, None))
    y = attend(tensors, options, backend)
    assert y.shape == (n_queries, 1, 2)
    assert torch.equal(y, torch.zeros_like(y))
    for grad in torch.autograd.grad(y.sum(), tensors):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_no_sequences_at_all() -> None:
    tensors, options = problem([], None, ("softmax", "none", True, 3, None))
    assert attend(tensors, options).shape == (0, 1, 2)


def test_softmax_by_hand() -> None:
    """Window 1, causal: the second of two tokens mixes both values by the softmax of its two scores."""
    cu = torch.tensor([0, 3])
    q = k = torch.tensor([[[1.0]], [[2.0]], [[3.0]]])
    v = torch.tensor([[[10.0]], [[20.0]], [[40.0]]])
    y = window_attention(q, k, v, q_cu=cu, k_cu=cu, causal=True, window=1, max_q=3, max_k=3).flatten()
    second = (10 * math.exp(2) + 20 * math.exp(4)) / (math.exp(2) + math.exp(4))
    third = (20 * math.exp(6) + 40 * math.exp(9)) / (math.exp(6) + math.exp(9))
    torch.testing.assert_close(y, torch.tensor([10.0, second, third]))


def test_relu2_by_hand() -> None:
    """Bidirectional window 2: scores are divided by 4; without a window by the number of visible keys, here 3."""
    cu = torch.tensor([0, 3])
    q = k = v = torch.tensor([[[1.0]], [[-2.0]], [[3.0]]])
    for window, divisor in ((2, 4), (None, 3)):
        y = window_attention(
            q, k, v, q_cu=cu, k_cu=cu, causal=False, window=window, max_q=3, max_k=3, activation="relu2"
        )
        expected = [sum(max(a * b / divisor, 0) ** 2 * b for b in (1, -2, 3)) for a in (1, -2, 3)]
        torch.testing.assert_close(y.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("rule", RULES[::5], ids=str)
def test_a_sequence_is_its_own_world(rule: tuple[Any, ...]) -> None:
    """What stands in the other sequences, even NaN, does not change an output."""
    lengths = [40, 7, 60]
    tensors, options = problem(lengths, None, rule)
    y = attend(tensors, options)
    poisoned = [x.detach().clone() for x in tensors]
    for x in poisoned[:3]:
        x[:40], x[47:] = math.nan, math.inf
    again = attend(poisoned, options)
    torch.testing.assert_close(again[40:47], y[40:47], rtol=0, atol=1e-12)
    assert not again[:40].isfinite().any()


@pytest.mark.parametrize("rule", [rule for rule in RULES[::3] if rule[2]], ids=str)
def test_causal_means_causal(rule: tuple[Any, ...]) -> None:
    tensors, options = problem([30], None, rule)
    grads = torch.autograd.grad(attend(tensors, options)[:17].sum(), tensors[:3])
    assert grads[2][:17].abs().sum() > 0
    for grad in grads:
        assert torch.equal(grad[17:], torch.zeros_like(grad[17:]))


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("rule", [("softmax", "original", True, 8, None), ("relu2", "none", False, None, 8)], ids=str)
def test_memory_is_linear_in_the_length(rule: tuple[Any, ...]) -> None:
    largest = []
    for length in (500, 1000):
        tensors, options = problem([length, 3], None, rule)
        with _Largest() as seen:
            attend(tensors, options).sum().backward()
        largest.append(seen.elements)
    assert largest[1] < 2.1 * largest[0]
    assert largest[1] < 1000 * 100


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_low_precision_error(causal: bool, window: int | None) -> None:
    """At most twice the error of PyTorch's own attention in bfloat16, maximum and mean."""
    tensors, options = problem([70], None, ("softmax", "none", causal, window, None))
    exact = attend(tensors, options)[:, 0]
    low = [x.detach().bfloat16() for x in tensors]
    ours = attend(low, options)[:, 0]
    distance = torch.arange(70) - torch.arange(70)[:, None]
    hidden = (distance > 0 if causal else distance > 70) | (distance.abs() > (70 if window is None else window))
    q, k, v = (x[None, :, 0] for x in low)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)[0]
    assert ours.dtype == torch.bfloat16
    for measure in (torch.max, torch.mean):
        assert measure((ours.double() - exact).abs()) <= 2 * measure((theirs.double() - exact).abs())


def test_autocast_keeps_scores_in_float32() -> None:
    tensors, options = problem([50], None, ("softmax", "original", True, 8, None), dtype=torch.float32)
    exact = attend([x.detach().double() for x in tensors], options)
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(tensors, options)
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rule", [("softmax", "original", True, 3, None), ("relu2", "none", False, None, 4)], ids=str)
# The compiler itself instantiates autograd functions, which PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("front", [None, [2, 0]])
def test_compiles_into_one_graph(rule: tuple[Any, ...], front: list[int] | None) -> None:
    tensors, options = problem([40, 9], front, rule)
    compiled = torch.compile(attend_eagerly, fullgraph=True, backend="aot_eager")
    y = compiled(tensors, options)
    torch.testing.assert_close(y, attend(tensors, options), rtol=0, atol=1e-12)
    grads = torch.autograd.grad(y.sum(), tensors)
    for ours, plain in zip(grads, torch.autograd.grad(attend(tensors, options).sum(), tensors), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def attend_eagerly(tensors: list[Tensor], options: dict[str, Any]) -> Tensor:
    return window_attention(*tensors[:3], bias_table=tensors[3] if len(tensors) > 3 else None, **options)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_dropout_drops_weights(backend: str) -> None:
    tensors, options = problem([400], None, ("softmax", "none", True, 1, None))
    ones = torch.ones_like(tensors[2])
    with using(backend), torch.no_grad():
        y = window_attention(tensors[0], tensors[1], ones, dropout=0.5, **options)
    assert 0.15 < float((y == 0).double().mean()) < 0.35  # both of two weights are dropped
    assert abs(float(y.mean()) - 1) < 0.15  # what remains is scaled up


BAD_OPTIONS = [
    ({"window": 0}, "window must be at least 1 or None, got 0"),
    ({"chunk": -1}, "chunk must be at least 1 or None, got -1"),
    ({"activation": "tanh"}, "activation must be .* got 'tanh'"),
    ({"bias": "far"}, "bias must be .* got 'far'"),
    ({"bias": "local"}, "bias_table goes with"),
    ({"bias": "local", "window": None, "bias_table": torch.zeros(5)}, "'local' needs a window"),
    ({"bias": "local", "bias_table": torch.zeros(5)}, "must have 17 entries"),
    ({"bias": "original", "bias_table": torch.zeros(4)}, r"must be \(2P - 1,\), got \(4,\)"),
    ({"bias": "original", "bias_table": torch.zeros(5), "q_position": None}, "needs q_position and k_position"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ({"q_cu": torch.tensor([0, 4])}, "q_cu must ascend from 0 to the 5 rows"),
    ({"k_cu": torch.tensor([0, 6, 5])}, "k_cu must ascend"),
    ({"k_cu": torch.tensor([0, 2, 5])}, "q_cu and k_cu must have the same length"),
    ({"k_start": torch.tensor([0, 1])}, "k_start must be"),
    ({"q_position": torch.tensor([0])}, r"q_position must be \(5,\), got \(1,\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD_OPTIONS, ids=[str(i) for i in range(len(BAD_OPTIONS))])
def test_bad_options_are_refused(change: dict[str, Any], message: str) -> None:
    tensors, options = problem([5], None, ("softmax", "none", True, 3, None))
    with pytest.raises((ConfigError, ShapeError), match=message):
        window_attention(*tensors, **(options | change))


def test_bad_tensors_are_refused() -> None:
    tensors, options = problem([5], None, ("softmax", "none", True, 3, None))
    q, k, v = (x.detach() for x in tensors)
    for bad, message in (
        ((q[:, 0], k, v), "q must be floating point"),
        ((q, k.long(), v), "k must be floating point"),
        ((q, k[..., :2], v), "must agree"),
        ((q, k, v.float()), "must have one dtype"),
    ):
        with pytest.raises(ShapeError, match=message):
            window_attention(*bad, **options)


@given(data=st.data())
def test_fixed_point_sums_are_the_sums(data: st.DataObject) -> None:
    """What adds up the gradient of a table where threads add in any order."""
    n, entries = data.draw(st.integers(0, 300)), data.draw(st.integers(1, 5))
    magnitude = 10.0 ** data.draw(st.integers(-30, 30))
    x = magnitude * torch.randn(n)
    index = torch.randint(entries, (n,))
    exact = torch.zeros(entries, dtype=torch.float64).index_add_(0, index, x.double())
    sums = fixed_point_sums(x, index, entries)
    torch.testing.assert_close(sums, exact.float(), rtol=1e-6, atol=1e-6 * magnitude)
    order = torch.randperm(n)
    assert torch.equal(fixed_point_sums(x[order], index[order], entries), sums)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_fixed_point_sums_hide_nothing(bad: float) -> None:
    assert fixed_point_sums(torch.tensor([1.0, bad]), torch.tensor([0, 1]), 2).isnan().all()
