"""Which layout a module takes, how wide its tokens are, and what cannot run correctly on compressed sequences.

A class of the user's own is taken to work token by token, unless it says a layout or contains a stock sequence module
(attention, a recurrent net, a convolution). PyTorch's modules take the layout that :mod:`sma.wrap.known` lists.
"""

from __future__ import annotations

from torch import nn

from sma.errors import ConfigError
from sma.interfaces import Layout, Module
from sma.runtime.plain import unwrapped
from sma.wrap.known import LAYOUTS, SEQUENCE_MODULES, check_stock, stock_class, stock_layouts

WIDTH_ATTRIBUTES = ("d_model", "embed_dim", "in_features", "input_size", "in_channels")


def infer_layout(module: nn.Module) -> Layout:
    """The layout that a module takes, from its class or from the stock modules that it contains.

    Returns:
        ``module.layout`` of a :class:`~sma.interfaces.Module` (or of any class that states one), the layout of a stock
        module, ``padded`` when a stock sequence module is inside or a part of an ``nn.Sequential`` takes sequences,
        else ``tokens``.

    Raises:
        ConfigError: a stock module can be called in more than one layout, or is of a class that is not known; or the
            stated layout is none.
    """
    module = unwrapped(module)
    stated = getattr(module, "layout", None)
    if stated is not None:
        if stated not in LAYOUTS:
            raise ConfigError(f"{type(module).__name__}.layout: must be {_CHOICES}, got {stated!r}")
        layout: Layout = stated
        return layout
    if is_chain(module):
        return "padded" if any(infer_layout(child) != "tokens" for child in module.children()) else "tokens"
    stock = stock_class(module)
    if stock is not None and not isinstance(module, SEQUENCE_MODULES):
        return _only_layout(module, stock)
    return "padded" if any(isinstance(part, SEQUENCE_MODULES) for part in module.modules()) else "tokens"


_CHOICES = f"{', '.join(map(repr, LAYOUTS[:-1]))} or {LAYOUTS[-1]!r}"


def _only_layout(module: nn.Module, stock: type[nn.Module]) -> Layout:
    possible = stock_layouts(stock)
    if len(possible) > 1:
        check_stock(module, stock, possible[0], causal=False)  # for some there is a better reason
        raise ConfigError(
            f"nn.{stock.__name__}: must be given a layout, since it may work token by token or not: layout='tokens' "
            "calls it with (K, D), layout='padded' with sequences; in an nn.Sequential, set .layout on the part"
        )
    return possible[0]


def is_chain(module: nn.Module) -> bool:
    """True for an ``nn.Sequential``, also of a derived class as long as it does not run its parts in its own way."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def infer_width(module: nn.Module) -> int | None:
    """The width of the tokens that a module takes, or None when it does not show."""
    module = unwrapped(module)
    if isinstance(module, nn.TransformerEncoderLayer):
        return infer_width(module.self_attn)
    if isinstance(module, nn.TransformerEncoder):
        return infer_width(module.layers[0])
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    for name in WIDTH_ATTRIBUTES:
        width = getattr(module, name, None)
        if isinstance(width, int) and width > 0:
            return width
    if isinstance(module, nn.Sequential):
        # Most activations and dropout show no width and keep it; anything else that shows none could change it.
        for child in module:
            width = infer_width(child)
            if width is not None:
                return width
            if next(child.parameters(), None) is not None or isinstance(unwrapped(child), _WIDTH_CHANGES):
                return None
    return None


_WIDTH_CHANGES = (nn.GLU, nn.Flatten, nn.Unflatten)


def check_supported(module: nn.Module, layout: Layout, causal: bool) -> None:
    """Refuse at build time what could not be run correctly on compressed sequences.

    A user's own sequence module can be used in a causal layer only if it says by an attribute ``causal = True`` that it
    is: the library cannot detect it, and a module that sees the future raises no error; its results are only too good.

    Raises:
        ConfigError: with the reason.
    """
    module = unwrapped(module)
    name = type(module).__name__
    if layout not in LAYOUTS:
        raise ConfigError(f"{name}: layout must be {_CHOICES}, got {layout!r}")
    if isinstance(module, Module):
        if causal and not module.causal:
            raise ConfigError(f"{name}: was built with causal=False, it cannot be used in a causal layer")
        return
    if is_chain(module) and layout != "packed":
        for part, child in module.named_children():
            taken = infer_layout(child)
            if layout == "tokens" and taken != "tokens":
                raise ConfigError(
                    f"{name}: layout must be 'padded', since part {part}, {type(unwrapped(child)).__name__}, takes "
                    f"{taken!r}; got 'tokens'"
                )
            check_supported(child, taken, causal)
        return
    stock = stock_class(module)
    if stock is not None:
        check_stock(module, stock, layout, causal)
    elif isinstance(module, SEQUENCE_MODULES) and layout == "padded":
        # Of a derived class with a forward of its own, which is called like its base.
        check_stock(module, next(kind for kind in SEQUENCE_MODULES if isinstance(module, kind)), layout, causal)
    elif type(module).forward is nn.Module.forward and "forward" not in module.__dict__:
        raise ConfigError(f"{name}: has no forward; wrap a module that can be called")
    if stock is None or len(stock_layouts(stock)) > 1:
        _check_claim(module, name, layout, causal)


def _check_claim(module: nn.Module, name: str, layout: Layout, causal: bool) -> None:
    known = isinstance(module, SEQUENCE_MODULES) and layout == "padded"
    if layout != "tokens" and causal and not known and getattr(module, "causal", False) is not True:
        raise ConfigError(
            f"{name}: cannot be used in a causal layer unless it is causal; if it is, say so: {name}.causal = True"
        )
