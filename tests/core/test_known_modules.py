"""PyTorch's own modules: each runs in the layout in which it is right, or is refused with the reason."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.configurators import Always
from sma.errors import ConfigError
from sma.layer import SparselyActivated
from sma.wrap.known import TOKEN_WISE, stock_class
from sma.wrap.layouts import infer_layout

WIDTH = 8


def activated(module: nn.Module, **options: Any) -> SparselyActivated:
    return SparselyActivated(module, Always.Config().build(), d_model=WIDTH, **options)


def sequence_by_sequence(module: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """The module on each sequence without padding, features in front as convolutions and pools take them."""
    out = torch.zeros_like(x)
    for row, length in enumerate(lengths.tolist()):
        out[row, :length] = module(x[row : row + 1, :length].mT)[0].mT
    return out


@pytest.mark.parametrize(
    "module",
    [
        nn.MaxPool1d(3, 1, 1),
        nn.MaxPool1d(2, 1, 1, dilation=2),
        nn.AvgPool1d(3, 1, 1),
        nn.LPPool1d(2, 1),
        nn.InstanceNorm1d(WIDTH, affine=True),
        nn.LocalResponseNorm(3),
        nn.ChannelShuffle(2),
        nn.ConstantPad1d((1, -1), 5.0),
        nn.ConstantPad1d((-2, 2), 5.0),
        nn.ZeroPad1d((0, 0)),
        nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1),
        nn.Dropout1d(0.5).eval(),
        nn.FeatureAlphaDropout(0.5).eval(),
        nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.MaxPool1d(3, 1, 1)),
        nn.Sequential(
            nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.InstanceNorm1d(WIDTH), nn.ReLU(), nn.AvgPool1d(3, 1, 1)
        ),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_on_features_in_front_are_given_sequences(module: nn.Module) -> None:
    layer, lengths = activated(module), torch.tensor([9, 2, 5])
    x = torch.randn(3, 9, WIDTH)
    assert layer.layouts == ["padded"]
    torch.testing.assert_close(layer(x, lengths=lengths).output, sequence_by_sequence(module, x, lengths))


def test_dropout_of_channels_drops_them_of_a_whole_sequence() -> None:
    torch.manual_seed(0)
    y = activated(nn.Dropout1d(0.5))(torch.ones(20, 9, WIDTH)).output
    assert torch.equal(y.amin(1), y.amax(1))
    assert sorted(y.unique().tolist()) == [0, 2]


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d(WIDTH, affine=True), nn.GroupNorm(WIDTH, WIDTH)])
def test_one_active_token_or_none_is_normalised_in_training(norm: nn.Module) -> None:
    layer = activated(norm, layout="padded")
    x = torch.randn(3, 4, WIDTH, requires_grad=True)
    y = layer(x, lengths=torch.tensor([1, 0, 4])).output
    torch.testing.assert_close(y[0, 0], torch.zeros(WIDTH), rtol=0, atol=1e-3)  # rounding over the root of eps
    layer(x, lengths=torch.zeros(3, dtype=torch.int64)).output.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_group_norm_has_to_say_over_what_it_normalises() -> None:
    norm, x = nn.GroupNorm(2, WIDTH), torch.randn(3, 9, WIDTH)
    with pytest.raises(ConfigError, match=r"nn.GroupNorm: must be given a layout, .*'tokens'.*'padded'"):
        activated(norm)
    with pytest.raises(ConfigError, match=r"nn.GroupNorm: must be given a layout"):
        activated(nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 1), norm))
    torch.testing.assert_close(activated(norm, layout="padded")(x).output, norm(x.mT).mT)
    torch.testing.assert_close(activated(norm, layout="tokens")(x).output, norm(x.flatten(0, 1)).view_as(x))
    norm.layout = "padded"
    chain = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm)
    torch.testing.assert_close(activated(chain)(x).output, norm(chain[0](x).mT).mT)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.MaxPool1d(2), "must keep the length .* stride 2"),
        (nn.AvgPool1d(3, 1), "must keep the length .* padding 0"),
        (nn.LPPool1d(2, 3, 1), "must keep the length"),
        (nn.MaxPool1d(3, 1, 1, return_indices=True), "return_indices: must be False"),
        (nn.ConvTranspose1d(WIDTH, WIDTH, 2, stride=2), "must keep the length"),
        (nn.ZeroPad1d((2, 0)), "must keep the length"),
        (nn.ReflectionPad1d(1), "does not keep the length"),
        (nn.AdaptiveAvgPool1d(3), "does not keep the length"),
        (nn.Upsample(scale_factor=2), "does not keep the length"),
        (nn.InstanceNorm1d(WIDTH, track_running_stats=True), "track_running_stats: must be False"),
        (nn.Conv2d(WIDTH, WIDTH, 1), "images or volumes"),
        (nn.BatchNorm2d(WIDTH), "images or volumes"),
        (nn.Dropout3d(), "images or volumes"),
        (nn.Bilinear(WIDTH, WIDTH, WIDTH), "two inputs"),
        (nn.CosineSimilarity(), "two inputs"),
        (nn.MSELoss(), "two inputs"),
        (nn.TransformerDecoderLayer(WIDTH, 2), "a second sequence, the memory"),
        (nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2), 1), "a second sequence, the memory"),
        (nn.Embedding(WIDTH, WIDTH), "takes indices"),
        (nn.GRUCell(WIDTH, WIDTH), "one step .* nn.GRU"),
        (nn.Softmax(1), "dim: must be -1"),
        (nn.GLU(0), "dim: must be -1"),
        (nn.LayerNorm((5, WIDTH)), "features of a token alone"),
        (nn.Flatten(0), "must keep dimension 0"),
        (nn.Unflatten(0, (2, 2)), "must keep dimension 0"),
        (nn.ModuleList([nn.Linear(WIDTH, WIDTH)]), "has no forward"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else None,
)
def test_what_cannot_work_is_refused_when_it_is_wrapped(module: nn.Module, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"{type(module).__name__}.*{reason}"):
        activated(module)
    with pytest.raises(ConfigError, match=rf"{type(module).__name__}.*{reason}"):
        activated(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.ReLU(), module)))
    with pytest.raises(ConfigError, match=type(module).__name__):
        activated(module, layout="tokens")


@pytest.mark.parametrize(
    "module",
    [
        *(nn.MaxPool1d(3, 1, 1), nn.AvgPool1d(3, 1, 1), nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1)),
        *(nn.InstanceNorm1d(WIDTH), nn.ConstantPad1d((-1, 1), 0.0)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_sees_the_future_is_refused_in_a_causal_layer(module: nn.Module) -> None:
    with pytest.raises(ConfigError, match=rf"nn.{type(module).__name__}: .* cannot be causal"):
        activated(module, causal=True)


def test_a_shift_to_later_places_is_causal() -> None:
    x = torch.randn(2, 6, WIDTH)
    y = activated(nn.ConstantPad1d((1, -1), 0.0), causal=True)(x).output
    torch.testing.assert_close(y, nn.functional.pad(x, (0, 0, 1, -1)))


@pytest.mark.parametrize("layout", ["token", "pad", "", 3])
@pytest.mark.parametrize("module", [nn.Linear(WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH), nn.Sequential(nn.Tanh())])
def test_an_unknown_layout_is_refused_with_those_there_are(module: nn.Module, layout: Any) -> None:
    with pytest.raises(ConfigError, match=f"layout must be 'tokens', 'packed' or 'padded', got {layout!r}"):
        activated(module, layout=layout)


@pytest.mark.parametrize(
    ("module", "layout", "allowed"),
    [
        (nn.MultiheadAttention(WIDTH, 2), "tokens", "'padded'"),
        (nn.MaxPool1d(3, 1, 1), "tokens", "'padded'"),
        (nn.BatchNorm1d(WIDTH), "padded", "'tokens'"),
        (nn.Linear(WIDTH, WIDTH), "packed", "'tokens'"),
        (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH)), "tokens", "'padded'"),
    ],
)
def test_a_layout_in_which_a_stock_module_is_wrong_is_refused(module: nn.Module, layout: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"layout must be {allowed}.*got {layout!r}"):
        activated(module, layout=layout)


class Doubling(nn.Linear):
    """A class with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.MaxPool1d):
    """Nothing but another name."""


def test_a_derived_class_is_stock_unless_it_has_a_forward_of_its_own() -> None:
    assert stock_class(Doubling(2, 2)) is None
    assert stock_class(Named(2)) is nn.MaxPool1d
    assert infer_layout(Named(3, 1, 1)) == "padded"
    assert infer_layout(nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 1))) == "padded"
    assert infer_layout(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) == "tokens"


@pytest.mark.parametrize(
    "module", [nn.MaxPool1d(3, 1, 1), nn.GRU(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())]
)
def test_a_compiled_stock_module_is_what_it_wraps(module: nn.Module) -> None:
    x, compiled = torch.randn(2, 5, WIDTH), torch.compile(module, backend="eager")
    layer = activated(compiled)
    assert layer.layouts == [infer_layout(module)]
    torch.testing.assert_close(layer(x).output, activated(module)(x).output)
    with pytest.raises(ConfigError, match="images"):
        activated(torch.compile(nn.Conv2d(WIDTH, WIDTH, 1), backend="eager"))


def test_a_layer_around_pools_is_compiled() -> None:
    layer = activated(nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), nn.MaxPool1d(3, 1, 1)))
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x).output, layer(x).output)


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **{"Linear": (6, 6), "LazyLinear": (6,), "LayerNorm": (6,), "RMSNorm": (6,), "Threshold": (0.1, 0.2)},
    **{"BatchNorm1d": (6,), "SyncBatchNorm": (6,), "Unflatten": (1, (6, 1)), "PReLU": (6,)},
    **{"Softmax": (-1,), "LogSoftmax": (-1,), "Softmin": (-1,)},
}


def _stock() -> list[type[nn.Module]]:
    found = {each for each in vars(nn).values() if inspect.isclass(each) and issubclass(each, TOKEN_WISE)}
    return sorted(found, key=lambda each: each.__name__)


@pytest.mark.parametrize("kind", _stock(), ids=lambda kind: kind.__name__)
def test_what_is_listed_as_token_wise_is(kind: Callable[..., nn.Module]) -> None:
    """Every class that passes as token-wise: one token alone gives what it gives among others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = kind(*ARGUMENTS.get(kind.__name__, ())).eval()
        x = torch.randn(5, 6)
        whole = module(x)
        alone = torch.cat([module(x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(whole, alone)
    assert infer_layout(kind(*ARGUMENTS.get(kind.__name__, ()))) == "tokens"
