"""What is known of PyTorch's own modules: which work token by token, which take sequences, and which cannot be used.

A stock module is one whose ``forward`` is that of a class of ``torch.nn``, also when it is parametrised, sharded or
derived from without another ``forward``. None of them is taken to work token by token unless it is listed here.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules import loss, pooling

from sma.errors import ConfigError
from sma.interfaces import Layout

LAYOUTS: tuple[Layout, ...] = ("tokens", "packed", "padded")

_ALONG_FEATURES = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU)
"""Token by token if they work along the last dimension."""
TOKEN_WISE = (
    nn.Linear,
    nn.Identity,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.BatchNorm1d,
    nn.LazyBatchNorm1d,
    nn.SyncBatchNorm,
    nn.Dropout,
    nn.AlphaDropout,
    nn.Flatten,
    nn.Unflatten,
    *_ALONG_FEATURES,
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU),
    *(nn.LogSigmoid, nn.Mish, nn.PReLU, nn.RReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU),
    *(nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
)
"""Each output row from the same input row of ``(K, D)``; a batch norm also from the statistics over all rows."""

SEQUENCE_MODULES = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
    nn.RNNBase,
    nn.Conv1d,
)
"""Take sequences; a class that contains one is taken to do so as well."""
ROW_BY_ROW = (
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.LPPool1d,
    nn.InstanceNorm1d,
    nn.LazyInstanceNorm1d,
    nn.GroupNorm,
    nn.ConstantPad1d,
)
"""Take ``(B, D, L)`` and would read padding: each sequence is given to them apart."""
CHANNELS_FIRST = (
    nn.ConvTranspose1d,
    nn.Dropout1d,
    nn.FeatureAlphaDropout,
    nn.LocalResponseNorm,
    nn.ChannelShuffle,
)
"""Take ``(B, D, L)`` and are right with zeros behind each row."""

_CANNOT: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    (
        (nn.Transformer, nn.TransformerDecoder, nn.TransformerDecoderLayer),
        "it needs a second sequence, the memory; wrap a class that holds it, or use nn.TransformerEncoderLayer",
    ),
    (
        (nn.Bilinear, nn.CosineSimilarity, nn.PairwiseDistance, loss._Loss, nn.AdaptiveLogSoftmaxWithLoss),
        "it needs two inputs; wrap a class that calls it",
    ),
    ((nn.Embedding, nn.EmbeddingBag), "it takes indices, and a layer activates floating-point tokens"),
    ((nn.RNNCellBase,), "it runs one step of a recurrent net; nn.GRU, nn.LSTM and nn.RNN run over a sequence"),
    (
        (
            *(nn.Upsample, nn.Fold, nn.Unfold, nn.PixelShuffle, nn.PixelUnshuffle, nn.MaxUnpool1d),
            *(pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd),
            *(nn.ReflectionPad1d, nn.ReplicationPad1d, nn.CircularPad1d),
        ),
        "it does not keep the length of a sequence; wrap a class that does as a whole, with layout='padded'",
    ),
)


def stock_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of PyTorch whose ``forward`` a module runs, None for a module with one of its own or with none."""
    kind = type(module)
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.nn.modules.", "torch.ao.nn.")):
            forward = getattr(base, "forward", None)
            return base if forward is kind.forward and forward is not nn.Module.forward else None
    return None


def stock_layouts(stock: type[nn.Module]) -> tuple[Layout, ...]:
    """The layouts in which a class of PyTorch can be called. Where there is more than one, the caller has to say it."""
    if issubclass(stock, nn.GroupNorm):  # over the features of a token, or over those of a sequence
        return ("tokens", "padded")
    if issubclass(stock, TOKEN_WISE):
        return ("tokens",)
    if issubclass(stock, (*SEQUENCE_MODULES, *ROW_BY_ROW, *CHANNELS_FIRST)):
        return ("padded",)
    if stock.__module__.startswith("torch.ao.") and stock.__name__ in {kind.__name__ for kind in TOKEN_WISE}:
        return ("tokens",)  # quantised
    return ("tokens", "padded")


def check_stock(module: nn.Module, stock: type[nn.Module], layout: Layout, causal: bool) -> None:
    """Refuse a stock module that cannot run on the active tokens of sequences, or not in this layout.

    Raises:
        ConfigError: with the reason.
    """
    name = f"nn.{stock.__name__}"
    for kinds, reason in _CANNOT:
        if issubclass(stock, kinds):
            raise ConfigError(f"{name}: cannot be activated sparsely: {reason}")
    if stock.__name__.endswith(("2d", "3d")):
        raise ConfigError(f"{name}: cannot be activated sparsely: it takes images or volumes, not sequences (B, L, D)")
    possible = stock_layouts(stock)
    if layout not in possible:
        raise ConfigError(f"{name}: layout must be {' or '.join(map(repr, possible))}, got {layout!r}")
    if layout == "tokens":
        _check_token_wise(module, name)
    elif isinstance(module, nn.Conv1d):
        _check_convolution(module)
        _check_centred(name, module.kernel_size[0], causal)
    elif isinstance(module, nn.RNNBase) and causal and module.bidirectional:
        raise ConfigError(f"{name}: a bidirectional recurrent net sees the future, it cannot be causal")
    elif isinstance(module, (nn.InstanceNorm1d, nn.GroupNorm)):
        if causal:
            raise ConfigError(f"{name}: normalises over the whole sequence and sees the future, it cannot be causal")
        if getattr(module, "track_running_stats", False):
            raise ConfigError(f"{name}.track_running_stats: must be False in a sparsely activated layer, got True")
    elif isinstance(module, nn.ConstantPad1d):
        _check_shift(module, name, causal)
    elif isinstance(module, (nn.MaxPool1d, nn.AvgPool1d, nn.LPPool1d, nn.ConvTranspose1d)):
        _check_length(module, name, causal)


def _check_token_wise(module: nn.Module, name: str) -> None:
    if isinstance(module, _ALONG_FEATURES) and module.dim != -1:
        raise ConfigError(f"{name}.dim: must be -1, the features of a token, got {module.dim}")
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
        raise ConfigError(
            f"{name}.normalized_shape: must be the features of a token alone, got {tuple(module.normalized_shape)}"
        )
    first = module.start_dim if isinstance(module, nn.Flatten) else 1
    if isinstance(module, nn.Unflatten):
        first = 1 if module.dim == -1 else module.dim
    if first != 1:
        raise ConfigError(f"{name}: must keep dimension 0, the tokens, and start at dimension 1, got {first}")


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


def _check_centred(name: str, kernel_size: int, causal: bool) -> None:
    if causal and kernel_size != 1:
        what = "a centred pool" if "Pool" in name else "a centred convolution"
        raise ConfigError(f"{name}: {what} sees the future, it cannot be causal")


def _check_length(module: nn.Module, name: str, causal: bool) -> None:
    """Pools and transposed convolutions: as many tokens must come out as go in."""

    def size(attribute: str, default: int) -> int:
        value = getattr(module, attribute, default)
        return int(value[0] if isinstance(value, tuple) else default if value is None else value)

    kernel = size("kernel_size", 1)
    stride, padding, dilation = size("stride", kernel), size("padding", 0), size("dilation", 1)
    if stride != 1 or 2 * padding != dilation * (kernel - 1) + size("output_padding", 0):
        raise ConfigError(
            f"{name}: must keep the length (stride 1, padding on both sides), got stride {stride}, padding {padding}, "
            f"kernel_size {kernel}, dilation {dilation}"
        )
    if getattr(module, "return_indices", False):
        raise ConfigError(f"{name}.return_indices: must be False, got True")
    _check_centred(name, kernel, causal)


def _check_shift(pad: nn.ConstantPad1d, name: str, causal: bool) -> None:
    left, right = pad.padding
    if left + right:
        raise ConfigError(
            f"{name}.padding: must keep the length, such as (1, -1), got {tuple(pad.padding)}; to pad in front of a "
            "convolution, put both into one class with layout = 'padded'"
        )
    if causal and left < 0:
        raise ConfigError(f"{name}: shifts later tokens to earlier places, it cannot be causal")
