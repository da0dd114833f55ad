"""The table of tools: what each does to a part, and the plain part that must compute the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from tests.tools.parts import Part


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Every projection by name."""
    return {name: each for name, each in module.named_modules() if isinstance(each, nn.Linear)}


def disturb(*parameters: Tensor) -> None:
    """Change what a tool has registered, as an optimiser does, which shows whether old weights were kept."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.25)


def substitute(module: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in the place of a submodule."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, new)


# What is done to a projection, or to a part.


def pruned(linear: nn.Linear) -> None:
    prune.l1_unstructured(linear, "weight", amount=0.5)
    disturb(linear.weight_orig)


def pruned_for_good(linear: nn.Linear) -> None:
    prune.l1_unstructured(linear, "weight", amount=0.5)
    prune.remove(linear, "weight")  # type: ignore[no-untyped-call]


def weight_norm(linear: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.* is deprecated", category=FutureWarning)
        nn.utils.weight_norm(linear)
    disturb(linear.weight_g, linear.weight_v)


def spectral_norm(linear: nn.Linear) -> None:
    nn.utils.spectral_norm(linear)
    disturb(linear.weight_orig)


def weight_norm_parametrised(linear: nn.Linear) -> None:
    parametrizations.weight_norm(linear)
    disturb(linear.parametrizations.weight.original0, linear.parametrizations.weight.original1)  # type: ignore[union-attr]


def spectral_norm_parametrised(linear: nn.Linear) -> None:
    parametrizations.spectral_norm(linear)
    disturb(linear.parametrizations.weight.original)  # type: ignore[union-attr]


class Scaled(nn.Module):
    """A parametrisation of anything."""

    def forward(self, x: Tensor) -> Tensor:
        """Half as much again."""
        return 1.5 * x


class Elsewhere(nn.Linear):
    """Computes in its own ``forward`` with weights of other names; ``weight`` and ``bias`` are not to be read."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
        self.own = nn.Parameter(weight.detach().clone())
        self.own_bias = None if bias is None else nn.Parameter(bias.detach().clone())
        for each in (self.weight, self.bias):
            if each is not None:
                nn.init.constant_(each, float("nan")).requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """As of every projection."""
        return F.linear(input, self.own, self.own_bias)


class Shifted(nn.Linear):
    """Adds 1 to its output."""

    def forward(self, input: Tensor) -> Tensor:
        """``linear(x) + 1``."""
        return super().forward(input) + 1


def shift(linear: nn.Linear) -> nn.Linear:
    """The same projection, one more."""
    new = Shifted(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=linear.weight.dtype)
    new.load_state_dict(linear.state_dict())
    return new


def each_linear(change: Callable[[nn.Linear], nn.Linear | None]) -> Callable[[nn.Module], nn.Module]:
    """Do it to every projection; where something is returned, it takes the projection's place."""

    def apply(module: nn.Module) -> nn.Module:
        for name, linear in linears(module).items():
            new = change(linear)
            if new is not None:
                substitute(module, name, new)
        return module

    return apply


def patched(linear: nn.Linear) -> None:
    """Another ``forward`` on the instance, as accelerate's hooks do it."""
    before = linear.forward
    linear.forward = lambda input: before(input) + 1  # type: ignore[method-assign]


def parametrise_everything(module: nn.Module) -> nn.Module:
    """A parametrisation on every parameter of every submodule."""
    for each in list(module.modules()):
        for name, _ in list(each.named_parameters(recurse=False)):
            parametrize.register_parametrization(each, name, Scaled())
    return module


# The plain part that computes the same.


def effective(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that a projection computes with now."""
    if isinstance(linear, Elsewhere):
        return linear.own, linear.own_bias
    for hook in linear._forward_pre_hooks.values():
        hook(linear, ())  # type: ignore[arg-type]
    return linear.weight, linear.bias


def same_weights(part: Part, changed: nn.Module) -> nn.Module:
    """A plain part with the weights that the projections of ``changed`` compute with."""
    plain: nn.Module = part.build()
    with torch.no_grad():
        for name, linear in linears(plain).items():
            weight, bias = effective(changed.get_submodule(name))  # type: ignore[arg-type]
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
    return plain


def one_more(part: Part, changed: nn.Module) -> nn.Module:
    """A part whose projections add 1 to their bias, by a class of its own."""
    plain: nn.Module = part.build()
    for name, linear in linears(plain).items():
        bias = torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias
        substitute(plain, name, Elsewhere(linear.weight, bias + 1))
    return plain


def scaled(part: Part, changed: nn.Module) -> nn.Module:
    """A plain part with every parameter half as large again."""
    plain: nn.Module = part.build()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    return plain


@dataclass(frozen=True)
class Tool:
    """What is done to every projection, or to everything.

    Attributes:
        name: in tests and in the table of the documentation.
        apply: does it to a part and returns the part.
        plain: the plain part that computes the same as the changed one.
        trained: names of the parameters that gradients have to arrive at, by what their name ends with.
        in_training: whether it computes the same in training.
        everything: it is done to parts without a projection too.
    """

    name: str
    apply: Callable[[nn.Module], nn.Module]
    plain: Callable[[Part, nn.Module], nn.Module] = same_weights
    trained: tuple[str, ...] = ()
    in_training: bool = True
    everything: bool = False

    def __str__(self) -> str:
        return self.name


TOOLS = (
    Tool("prune", each_linear(pruned), trained=("weight_orig",)),
    Tool("prune, removed", each_linear(pruned_for_good), trained=("weight",)),
    Tool("weight_norm", each_linear(weight_norm), trained=("weight_g", "weight_v")),
    Tool("spectral_norm", each_linear(spectral_norm), trained=("weight_orig",), in_training=False),
    Tool("weight_norm, parametrised", each_linear(weight_norm_parametrised), trained=("original0", "original1")),
    Tool(
        "spectral_norm, parametrised", each_linear(spectral_norm_parametrised), trained=("original",), in_training=False
    ),
    Tool("a parametrisation of every parameter", parametrise_everything, scaled, ("original",), everything=True),
    Tool("a Linear with weights of its own", each_linear(lambda it: Elsewhere(it.weight, it.bias)), trained=("own",)),
    Tool("a Linear that adds 1", each_linear(shift), one_more, ("weight",)),
    Tool("a Linear with another forward", each_linear(patched), one_more, ("weight",)),
)


def snapshot(module: nn.Module) -> Any:
    """A copy, for a comparison after it has changed."""
    return copy.deepcopy(module)
