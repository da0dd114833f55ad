"""SparselyActivated and SparseMixture: the explicit sum, widths, bad input, odd shapes, compilation, distribution."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.configurators import Always, ExpertChoice, FixedRate, RateController, RateLoss, Sigmoid, TopK
from sma.errors import ConfigError, RoutingError, ShapeError, StreamingError
from sma.interfaces import Configurator
from sma.layer import ActivatedConfig, MixtureConfig, SparselyActivated, SparseMixture
from sma.ops import using
from sma.routing import Packed, Routing
from tests.core.parts import Losing, Running


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    n_modules=st.integers(1, 4),
    k=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_a_mixture_is_the_sum_of_the_paper(lengths: list[int], n_modules: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    members = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(n_modules)]
    layer = SparseMixture(members, TopK.Config(k=min(k, n_modules)).build(n_modules=n_modules)).double()
    x = torch.randn(len(lengths), 6, 4, dtype=torch.float64)
    valid = torch.arange(6) < torch.tensor(lengths)[:, None]
    out = layer(x, valid=valid)
    weight = out.routing.active * out.routing.confidence
    expected = sum(weight[..., m, None] * member(x) for m, member in enumerate(members))
    torch.testing.assert_close(out.output, expected)


def test_every_function_in_the_span_is_reached() -> None:
    """Theorem 1 (coverage): for any choice of coefficients a decision and a confidence give that combination."""
    members = [nn.Linear(3, 3).double() for _ in range(3)]
    x = torch.randn(1, 7, 3, dtype=torch.float64)
    wanted = torch.randn(1, 7, 3, dtype=torch.float64) * (torch.rand(1, 7, 3) < 0.6)
    from sma.configurators import Replay

    routing = Routing(wanted != 0, wanted, torch.ones(1, 7, dtype=torch.bool), torch.arange(7)[None])
    y = SparseMixture(members, Replay.of(routing))(x).output
    torch.testing.assert_close(y, sum(wanted[..., m, None] * member(x) for m, member in enumerate(members)))


def test_losses_carry_the_number_of_their_module() -> None:
    one = SparselyActivated(Losing(4))
    assert set(one(torch.randn(1, 5, 4)).losses) == {"size"}
    many = SparseMixture([nn.Linear(4, 4), Losing(4), Losing(4)])
    assert set(many(torch.randn(1, 5, 4)).losses) == {"1.size", "2.size"}


def test_nothing_is_stored_on_the_layer() -> None:
    layer = SparselyActivated(nn.Linear(4, 4))
    before = set(vars(layer)) | set(dict(layer.named_buffers()))
    layer(torch.randn(2, 3, 4))
    assert set(vars(layer)) | set(dict(layer.named_buffers())) == before


def test_hooks_of_the_module_see_active_tokens_only() -> None:
    layer, seen = SparselyActivated(nn.Linear(4, 4)), []
    layer.module.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    routing = layer(torch.randn(2, 9, 4)).routing
    assert seen == [int(routing.active.sum())]
    assert 0 < seen[0] < 18


# Widths


@pytest.mark.parametrize(
    ("module", "width"),
    [
        (nn.Linear(6, 2), 6),
        (nn.Sequential(nn.Dropout(0.1), nn.GELU(), nn.Linear(5, 3)), 5),
        (nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 7)), 7),
        (nn.MultiheadAttention(8, 2), 8),
        (nn.TransformerEncoderLayer(8, 2, 16), 8),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False), 8),
        (nn.LSTM(3, 4), 3),
        (nn.Conv1d(5, 5, 1), 5),
        (nn.Sequential(nn.Conv1d(5, 5, 1), nn.ReLU()), 5),
        (nn.Identity(), None),
        (nn.LazyLinear(4), None),
        (nn.Sequential(nn.PReLU(), nn.Linear(4, 4)), None),
    ],
)
def test_the_width_is_inferred(module: nn.Module, width: int | None) -> None:
    layer = SparselyActivated(module)
    assert layer.d_model == width
    assert nn.parameter.is_lazy(layer.router.weight) == (width is None)
    x = torch.randn(2, 3, width or 4)
    layer(x)
    assert layer.d_model == x.shape[-1]
    assert layer.router.weight.shape == (2, x.shape[-1])
    with pytest.raises(ShapeError, match=f"d_model = {x.shape[-1]}"):
        layer(torch.randn(2, 3, x.shape[-1] + 1))


def test_a_width_known_late_initialises_like_one_known_early() -> None:
    torch.manual_seed(0)
    early = SparselyActivated(nn.ReLU(), d_model=4)
    late = SparselyActivated(nn.ReLU())
    torch.manual_seed(0)
    x = torch.randn(4, 50, 4)
    late(x)
    for name, value in early.state_dict().items():
        other = late.state_dict()[name]
        assert other.shape == value.shape
        assert other.abs().max() <= 0.04 or torch.equal(other, value), name
    assert late.configurator.temp.item() == pytest.approx(early.configurator.temp.item())


def test_a_lazy_layer_is_loaded_before_its_first_call() -> None:
    source, target, x = SparselyActivated(nn.ReLU()), SparselyActivated(nn.ReLU()), torch.randn(2, 5, 4)
    source(x)
    with torch.no_grad():
        source.configurator.temp.fill_(0.123)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x).output, source(x).output)
    assert target.configurator.temp.item() == pytest.approx(0.123)
    with pytest.raises(ShapeError):
        target(torch.randn(2, 5, 3))


class Masking(nn.Module):
    """Shows no width, and makes a buffer at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = torch.full((x.shape[-1],), 2.0)
        return x @ self.weight * self.scale


@pytest.mark.parametrize(
    ("module", "d_model"),
    [
        (Masking(), None),
        (nn.Sequential(nn.LazyLinear(8), nn.ReLU(True), nn.LazyLinear(4)), None),
        (nn.Sequential(nn.LazyLinear(8), nn.ReLU(True), nn.LazyLinear(4)), 4),
    ],
)
def test_a_layer_first_called_in_inference_mode_is_trained_later(module: nn.Module, d_model: int | None) -> None:
    layer = SparselyActivated(copy.deepcopy(module), d_model=d_model)
    x = torch.randn(2, 5, 4)
    with torch.inference_mode():
        given = torch.ones(1) * x  # an inference tensor
        first = layer(given).output
    assert torch.equal(given, x)
    assert not any(each.is_inference() for each in [*layer.parameters(), *layer.buffers()])
    out = layer(x).output
    torch.testing.assert_close(out, first)
    out.sum().backward()
    assert all(each.grad is not None for each in layer.parameters())
    with torch.inference_mode():
        assert layer(x).output.is_inference(), "only the first call leaves inference mode"


def test_a_lazy_layer_is_saved_before_its_first_call() -> None:
    file = io.BytesIO()
    torch.save(SparselyActivated(nn.ReLU()).state_dict(), file)
    file.seek(0)
    layer, x = SparselyActivated(nn.ReLU()), torch.randn(2, 5, 4)
    layer.load_state_dict(torch.load(file, weights_only=False))
    layer(x)
    assert layer.configurator.temp.item() == pytest.approx(torch.tensor(0.3 * 2).log().item())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("called", [False, True])
def test_layers_can_be_copied(copied: Any, called: bool) -> None:
    layer, x = SparselyActivated(nn.ReLU()), torch.randn(2, 5, 4)
    if called:
        layer(x)
    other = copied(layer)
    other(x)
    layer(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x).output, other(x).output)
    assert layer.router.weight is not other.router.weight


# Bad input


@pytest.mark.parametrize("configurator", [None, Always.Config(), FixedRate.Config(rate=0.5), Sigmoid.Config()])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(configurator: Any, value: float) -> None:
    layer = SparselyActivated(nn.Linear(4, 4), configurator and configurator.build(n_modules=1))
    x = torch.randn(2, 3, 4)
    x[1, 2, 3] = value
    with pytest.raises(ShapeError, match="SparselyActivated: x must be finite"):
        layer(x)


def test_values_that_are_finite_and_their_sum_is_not() -> None:
    layer = SparselyActivated(nn.Linear(4, 4), Always.Config().build(n_modules=1))
    assert layer(torch.full((2, 3, 4), 3e38)).routing.active.all()


def test_padding_may_hold_anything() -> None:
    layer = SparselyActivated(nn.Linear(4, 4))
    x = torch.randn(2, 5, 4)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[:, 3:] = False
    expected = layer(x[:, :3]).output
    x[:, 3:] = float("nan")
    y = layer(x, valid=valid).output
    torch.testing.assert_close(y[:, :3], expected)
    assert not y[:, 3:].any()
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (
            torch.zeros(2, 3, 4, dtype=torch.int64),
            {},
            r"x must be floating point with shape \(B, L, D\), got torch.int64",
        ),
        (torch.zeros(3, 4), {}, r"got torch.float32 \(3, 4\)"),
        (torch.zeros(1, 2, 3, 4), {}, r"\(1, 2, 3, 4\)"),
        (torch.zeros(2, 3, 5), {}, r"must have d_model = 4 features, got \(2, 3, 5\)"),
        (torch.zeros(2, 3, 4), {"valid": torch.ones(2, 3)}, "valid must be bool of shape .*got torch.float32"),
        (
            torch.zeros(2, 3, 4),
            {"valid": torch.ones(2, 4, dtype=torch.bool)},
            r"valid must be .*got torch.bool \(2, 4\)",
        ),
        (
            torch.zeros(2, 3, 4),
            {"valid": torch.ones(2, 3, dtype=torch.bool, device="meta")},
            "valid must be on the device",
        ),
        (torch.zeros(2, 3, 4), {"logits": torch.zeros(2, 3, 3)}, r"logits must hold \(B, L, M, C\) = \(2, 3, 1, 2\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(x: Tensor, options: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        SparselyActivated(nn.Linear(4, 4))(x, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SparseMixture([]), "at least one module"),
        (lambda: SparselyActivated(nn.Linear), "must be an nn.Module, got <class"),  # type: ignore[arg-type]
        (lambda: SparselyActivated(torch.relu), "must be an nn.Module"),  # type: ignore[arg-type]
        (
            lambda: SparseMixture([nn.Linear(2, 2)] * 2, Always.Config().build(n_modules=3)),
            "decides on 3 modules, the layer has 2",
        ),
        (
            lambda: SparselyActivated(nn.Linear(2, 2), ExpertChoice.Config().build(), causal=True),
            "ExpertChoice looks ahead",
        ),
        (lambda: SparselyActivated(nn.LSTM(2, 2, bidirectional=True), causal=True), "bidirectional recurrent net"),
        (lambda: SparselyActivated(nn.Sequential(nn.Conv1d(2, 2, 3, padding=1)), causal=True), "sees the future"),
        (lambda: SparselyActivated(nn.Conv1d(2, 2, 3)), r"must keep the length \(stride 1, padding 'same'\)"),
        (lambda: SparselyActivated(nn.Conv1d(2, 2, 3, padding=1, stride=2)), "stride 2"),
        (
            lambda: SparselyActivated(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")),
            "padding_mode: must be 'zeros'",
        ),
        (
            lambda: SparselyActivated(Running.Config().build(d_model=2), causal=True),
            "Running: was built with causal=False",
        ),
        (lambda: MixtureConfig(modules=()), "modules: must not be empty"),
    ],
)
def test_parts_that_do_not_fit_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_layer_without_a_router_needs_logits() -> None:
    layer = SparselyActivated(nn.Linear(4, 4), router=False)
    with pytest.raises(ShapeError, match="logits must be given"):
        layer(torch.randn(1, 2, 4))
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    assert layer(torch.randn(1, 2, 4), logits=logits).routing.active.flatten().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (1, 1, 4), (0, 0, 4)])
@pytest.mark.parametrize(
    "module", [nn.Linear(4, 4), nn.GRU(4, 4), nn.MultiheadAttention(4, 2), Running.Config().build(d_model=4)]
)
def test_empty_and_tiny_batches(shape: tuple[int, int, int], module: nn.Module) -> None:
    layer = SparselyActivated(module)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert out.output.shape == shape
    assert out.routing.rate().shape == (shape[0], 1)
    out.output.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_replay_that_does_not_fit_is_refused() -> None:
    layer = SparselyActivated(nn.Linear(4, 4))
    routing = layer(torch.randn(2, 3, 4)).routing
    with pytest.raises(RoutingError, match=r"replay: must be of shape \(B, L, M\) = \(2, 4, 1\), got \(2, 3, 1\)"):
        layer(torch.randn(2, 4, 4), replay=routing)


def test_a_replay_never_activates_padding() -> None:
    layer = SparselyActivated(nn.Linear(4, 4))
    full = Routing(
        *(torch.ones(1, 4, 1, dtype=torch.bool), torch.ones(1, 4, 1)),
        torch.ones(1, 4, dtype=torch.bool),
        torch.arange(4)[None],
    )
    valid = torch.tensor([[True, True, False, False]])
    assert layer(torch.randn(1, 4, 4), valid=valid, replay=full).routing.active.flatten().tolist() == [
        True,
        True,
        False,
        False,
    ]


# Streaming


class Packing(nn.Module):
    """A user's class of layout "packed" that is no module of this library."""

    def forward(self, x: Tensor, packed: Packed, state: Any) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: SparselyActivated(nn.LSTM(4, 4)), "LSTM keeps no bounded working memory"),
        (lambda: SparselyActivated(nn.Linear(4, 4), TopK.Config(over="sequence").build()), "TopK looks ahead"),
        (lambda: SparselyActivated(Running.Config().build(d_model=4)), "Running looks ahead"),
        (
            lambda: SparselyActivated(Running.Config(bounded=False).build(d_model=4, causal=True)),
            "Running has no bounded memory",
        ),
        (lambda: SparselyActivated(Packing(), layout="packed"), "Packing keeps no bounded working memory"),
    ],
)
def test_what_cannot_stream_says_why(layer: Any, reason: str) -> None:
    built = layer()
    assert reason in built.why_not_streaming()
    with pytest.raises(StreamingError, match=f"cannot stream: .*{reason}"):
        built.initial_state(1, torch.zeros(1))
    state = SparselyActivated(nn.Linear(4, 4)).initial_state(1, torch.zeros(1))
    with pytest.raises(StreamingError, match=reason):
        built(torch.randn(1, 2, 4), state)


@pytest.mark.parametrize("causal", [False, True])
def test_always_on_layers_of_tokens_stream(causal: bool) -> None:
    layer = SparselyActivated(nn.Linear(4, 4), Always.Config().build(), causal=causal)
    assert layer.why_not_streaming() is None
    x = torch.randn(2, 6, 4)
    state = layer.initial_state(2, x)
    first = layer(x[:, :4], state)
    second = layer(x[:, 4:], first.state)
    torch.testing.assert_close(torch.cat([first.output, second.output], 1), layer(x).output)
    assert second.state.seen.tolist() == [6, 6]
    assert second.routing.position.tolist() == [[4, 5]] * 2


def test_a_state_of_another_batch_is_refused() -> None:
    layer = SparselyActivated(nn.Linear(4, 4))
    with pytest.raises(StreamingError, match="the state is of a batch of 3, x of 2"):
        layer(torch.randn(2, 1, 4), layer.initial_state(3, torch.zeros(1)))


# Specs


def test_configurations_build_layers() -> None:
    config = ActivatedConfig(module=Running.Config(), configurator=Sigmoid.Config(threshold=0.3))
    layer = config.build(d_model=4, causal=True)
    assert isinstance(layer.module, Running)
    assert layer.module.causal
    assert layer.configurator.threshold == 0.3
    mixture = MixtureConfig(modules=(Running.Config(), Running.Config()), configurator=TopK.Config(k=1)).build(
        d_model=4
    )
    assert isinstance(mixture, SparseMixture)
    assert len(mixture.members) == 2
    with pytest.raises(ConfigError, match="k: must be at most the number of modules, 1, got 2"):
        ActivatedConfig(module=Running.Config(), configurator=TopK.Config(k=2)).build(d_model=4)


# Compilation and distribution


# The compiler itself looks at .grad where a graph goes on behind a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_layer_compiles() -> None:
    torch.manual_seed(0)
    layer, x = SparselyActivated(nn.Linear(4, 4)), torch.randn(2, 6, 4)
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(out.output, expected.output)
    assert torch.equal(out.routing.active, expected.routing.active)
    out.output.sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0


def _train_on_rank(rank: int, folder: str) -> None:
    """On rank 0 nothing is active; the gradients of both ranks still meet."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = SparseMixture(
        [nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True), Running.Config().build(d_model=4)]
    )
    parallel = nn.parallel.DistributedDataParallel(layer)
    x = torch.randn(2, 5, 4)
    usual = layer(x).routing.detach()
    silent = Routing(torch.zeros_like(usual.active), usual.confidence, usual.valid, usual.position)
    for _ in range(2):  # a parameter missing from one rank's graph shows at the second step
        layer.zero_grad()
        parallel(x, replay=silent if rank == 0 else usual).output.square().sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    layer(x, replay=usual).output.square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad / 2, msg=name)
    Path(folder, f"done{rank}").touch()
    dist.destroy_process_group()


def test_ranks_that_activate_different_modules_train_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_on_rank, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists()
    assert (tmp_path / "done1").exists()


@pytest.mark.parametrize(
    "fixed",
    [
        Always(Always.Config()),
        FixedRate(FixedRate.Config(rate=0.5)),
        ExpertChoice(ExpertChoice.Config(rate=0.5)),
        TopK(TopK.Config(over="sequence")),
    ],
    ids=lambda configurator: type(configurator).__name__,
)
@pytest.mark.parametrize(
    "held",
    [{"rate_loss": RateLoss.Config(target=0.5).build()}, {"controller": RateController.Config(target=0.5).build()}],
    ids=lambda held: next(iter(held)),
)
def test_a_fixed_rate_cannot_be_held_elsewhere(fixed: Configurator, held: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(held))}: must not be given with {type(fixed).__name__}"):
        SparselyActivated(nn.Linear(4, 4), fixed, **held)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_where_all_are_active_nobody_looks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a row searched for, nor do the results change; padding, or a decision of one's own, is looked at."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    layer = SparselyActivated(module, Always.Config().build())
    x = torch.randn(2, 5, 3, requires_grad=True)
    expected = layer(x, valid=torch.ones(2, 5, dtype=torch.bool))
    assert not expected.routing.packed[0].whole

    def nobody(*_: Any, **__: Any) -> None:
        raise AssertionError("pack was called")

    with monkeypatch.context() as patched, using(backend):
        patched.setattr("sma.decision.pack", nobody)
        out = layer(x)
        torch.testing.assert_close(out.output, expected.output)
        (by_x,), (expected_by_x,) = (torch.autograd.grad(each.output.square().sum(), x) for each in (out, expected))
        torch.testing.assert_close(by_x, expected_by_x)
        with pytest.raises(AssertionError, match="pack was called"):
            SparselyActivated(module, Odd.Config().build())(x)
    for name in ("index", "cu_seqlens", "position", "row", "max_length", "shape"):
        mine, other = (getattr(each.routing.packed[0], name) for each in (out, expected))
        assert torch.equal(mine, other) if isinstance(mine, Tensor) else mine == other, name
    odd = SparselyActivated(module, Odd.Config().build())(x)
    assert odd.routing.active[..., 0].tolist() == [[False, True, False, True, False]] * 2


class Odd(Always):
    """Decides anew, which its base knows nothing of."""

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        return (position % 2 == 1)[..., None].expand_as(score)


def test_a_module_that_writes_into_its_tokens_leaves_the_input_alone() -> None:
    x = torch.randn(2, 5, 3)
    before = x.clone()
    out = SparselyActivated(nn.ReLU(inplace=True), Always.Config().build(), d_model=3)(x)
    assert torch.equal(x, before)
    assert torch.equal(out.output, before.relu())
