"""Which layout a module takes, how wide its tokens are, and what cannot run correctly on compressed sequences.

A plain ``nn.Module`` is taken to work token by token. Stock sequence modules (attention, recurrent nets, convolutions)
take the ``padded`` layout.
"""

from __future__ import annotations

from torch import nn

from sma.errors import ConfigError
from sma.interfaces import Layout, Module

SEQUENCE_MODULES = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
    nn.RNNBase,
    nn.Conv1d,
)
WIDTH_ATTRIBUTES = ("d_model", "embed_dim", "in_features", "input_size", "in_channels")


def infer_layout(module: nn.Module) -> Layout:
    """The layout that a module takes, from its class or from the stock modules that it contains.

    Returns:
        ``module.layout`` of a :class:`~sma.interfaces.Module` (or of any class that states one), ``padded`` when a
        stock sequence module is inside or a part of an ``nn.Sequential`` takes sequences, else ``tokens``.
    """
    stated = getattr(module, "layout", None)
    if stated is not None:
        if stated not in ("tokens", "packed", "padded"):
            raise ConfigError(f"{type(module).__name__}.layout: must be 'tokens', 'packed' or 'padded', got {stated!r}")
        layout: Layout = stated
        return layout
    if is_chain(module):
        return "padded" if any(infer_layout(child) != "tokens" for child in module.children()) else "tokens"
    return "padded" if any(isinstance(part, SEQUENCE_MODULES) for part in module.modules()) else "tokens"


def is_chain(module: nn.Module) -> bool:
    """True for an ``nn.Sequential``, also of a derived class as long as it does not run its parts in its own way."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def infer_width(module: nn.Module) -> int | None:
    """The width of the tokens that a module takes, or None when it does not show."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return int(module.self_attn.embed_dim)
    if isinstance(module, nn.TransformerEncoder):
        return infer_width(module.layers[0])
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    for name in WIDTH_ATTRIBUTES:
        width = getattr(module, name, None)
        if isinstance(width, int) and width > 0:
            return width
    if isinstance(module, nn.Sequential):
        # Activations and dropout show no width and keep it; anything else that shows none could change it.
        for child in module:
            width = infer_width(child)
            if width is not None:
                return width
            if next(child.parameters(), None) is not None:
                return None
    return None


def check_supported(module: nn.Module, layout: Layout, causal: bool) -> None:
    """Refuse at build time what could not be run correctly on compressed sequences.

    A user's own sequence module can be used in a causal layer only if it says by an attribute ``causal = True`` that it
    is: the library cannot detect it, and a module that sees the future raises no error; its results are only too good.

    Raises:
        ConfigError: with the reason.
    """
    name = type(module).__name__
    if isinstance(module, Module):
        if causal and not module.causal:
            raise ConfigError(f"{name}: was built with causal=False, it cannot be used in a causal layer")
    elif layout == "padded" and (is_chain(module) or isinstance(module, SEQUENCE_MODULES)):
        _check_stock(module, causal)
    elif layout != "tokens" and causal and getattr(module, "causal", False) is not True:
        raise ConfigError(
            f"{name}: cannot be used in a causal layer unless it is causal; if it is, say so: {name}.causal = True"
        )


def _check_stock(module: nn.Module, causal: bool) -> None:
    if is_chain(module):
        for child in module.children():
            check_supported(child, infer_layout(child), causal)
    elif isinstance(module, nn.Conv1d):
        _check_convolution(module)
        if causal and module.kernel_size != (1,):
            raise ConfigError("nn.Conv1d: a centred convolution sees the future, it cannot be causal")
    elif isinstance(module, nn.RNNBase) and causal and module.bidirectional:
        name = type(module).__name__
        raise ConfigError(f"nn.{name}: a bidirectional recurrent net sees the future, it cannot be causal")


def _check_convolution(conv: nn.Conv1d) -> None:
    if conv.padding_mode != "zeros":
        raise ConfigError(
            f"nn.Conv1d.padding_mode: must be 'zeros', other modes would read padding, got {conv.padding_mode!r}"
        )
    span = conv.dilation[0] * (conv.kernel_size[0] - 1)
    both_sides = span if conv.padding == "same" else 0 if conv.padding == "valid" else 2 * int(conv.padding[0])
    if conv.stride != (1,) or both_sides != span:
        raise ConfigError(
            "nn.Conv1d: must keep the length (stride 1, padding 'same'), got "
            f"stride {conv.stride[0]}, padding {conv.padding!r}, kernel_size {conv.kernel_size[0]}, "
            f"dilation {conv.dilation[0]}"
        )
