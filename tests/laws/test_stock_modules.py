"""torch's own modules, and a user's, obey the laws without an edit to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sma.testing import StockSuite

WIDTH = 8


class TestLinear(StockSuite):
    streams = True
    causal = True

    def create(self) -> nn.Module:
        return nn.Linear(WIDTH, WIDTH)


class TestFeedForward(StockSuite):
    streams = True

    def create(self) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))


class TestLazyWidth(StockSuite):
    """Neither the module nor the layer knows the width before the first call."""

    streams = True

    def create(self) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, WIDTH))

    def build(self) -> nn.Module:
        from sma.layer import SparselyActivated

        layer = SparselyActivated(self.create())
        layer(torch.randn(1, 2, WIDTH))
        return layer


class _Attention(StockSuite):
    batch_first = True

    def create(self) -> nn.Module:
        return nn.MultiheadAttention(WIDTH, 2, batch_first=self.batch_first)

    def native(self, module: nn.Module, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        x = x if self.batch_first else x.transpose(0, 1)
        y: Tensor = module(x, x, x, attn_mask=mask)[0]
        return y if self.batch_first else y.transpose(0, 1)


class TestAttention(_Attention):
    pass


class TestAttentionCausal(_Attention):
    causal = True


class TestAttentionTimeFirst(_Attention):
    batch_first = False


class _Encoder(StockSuite):
    batch_first = True
    depth = 0
    norm_first = False

    def create(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 16, dropout=0.1, batch_first=self.batch_first, norm_first=self.norm_first
        )
        return nn.TransformerEncoder(layer, self.depth, enable_nested_tensor=False) if self.depth else layer

    def native(self, module: nn.Module, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        x = x if self.batch_first else x.transpose(0, 1)
        y: Tensor = module(x, mask)
        return y if self.batch_first else y.transpose(0, 1)


class TestEncoderLayer(_Encoder):
    pass


class TestEncoderLayerCausal(_Encoder):
    causal = True
    norm_first = True


class TestEncoderLayerTimeFirst(_Encoder):
    batch_first = False


class TestEncoder(_Encoder):
    depth = 2


class _Recurrent(StockSuite):
    def native(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x if getattr(module, "batch_first", False) else x.transpose(0, 1))[0]
        return y if getattr(module, "batch_first", False) else y.transpose(0, 1)


class TestLSTM(_Recurrent):
    causal = True

    def create(self) -> nn.Module:
        return nn.LSTM(WIDTH, WIDTH)


class TestLSTMBidirectional(_Recurrent):
    def create(self) -> nn.Module:
        return nn.LSTM(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)


class TestGRU(_Recurrent):
    causal = True

    def create(self) -> nn.Module:
        return nn.GRU(WIDTH, WIDTH, 2, batch_first=True, dropout=0.1)


class TestGRUBidirectional(_Recurrent):
    def create(self) -> nn.Module:
        return nn.GRU(WIDTH, WIDTH // 2, bidirectional=True)


class _Convolution(StockSuite):
    def native(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x.transpose(1, 2)).transpose(1, 2)
        return y


class TestConvolution(_Convolution):
    def create(self) -> nn.Module:
        return nn.Conv1d(WIDTH, WIDTH, 3, padding=1)


class TestConvolutionDilated(_Convolution):
    def create(self) -> nn.Module:
        return nn.Conv1d(WIDTH, WIDTH, 4, padding="same", dilation=2)


class TestConvolutionTransposed(_Convolution):
    def create(self) -> nn.Module:
        return nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1)


class TestPool(_Convolution):
    """Of the module's own padding, never of what stands behind a sequence."""

    def create(self) -> nn.Module:
        return nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.MaxPool1d(3, 1, 1), nn.AvgPool1d(3, 1, 1))


class TestInstanceNorm(_Convolution):
    def create(self) -> nn.Module:
        return nn.InstanceNorm1d(WIDTH, affine=True)

    def native(self, module: nn.Module, x: Tensor) -> Tensor:
        twice = torch.cat([x, x], 1)  # the same statistics; a single token is refused in training
        return super().native(module, twice)[:, : x.shape[1]]


class TestGroupNormOfSequences(TestInstanceNorm):
    layout = "padded"

    def create(self) -> nn.Module:
        return nn.GroupNorm(2, WIDTH)


class TestGroupNormOfTokens(StockSuite):
    layout = "tokens"
    causal = True
    streams = True

    def create(self) -> nn.Module:
        return nn.GroupNorm(2, WIDTH)

    def native(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x[0])[None]
        return y


class TestChainOfConvolutions(StockSuite):
    """A chain whose parts take sequences and tokens by turns; the batch norm counts real tokens only."""

    def create(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(WIDTH, 12, 3, padding=1),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.Sequential(nn.Conv1d(12, WIDTH, 3, padding=1), nn.LayerNorm(WIDTH)),
        )

    def native(self, module: nn.Module, x: Tensor) -> Tensor:
        first, norm, relu, last = module
        y = relu(norm(first(x.transpose(1, 2))))
        out: Tensor = last[1](last[0](y).transpose(1, 2))
        return out


class WithMask(nn.Module):
    """A user's class that takes a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.out(self.attention(x, x, x, key_padding_mask=key_padding_mask)[0])
        return x + y


class WithoutMask(nn.Module):
    """A user's class that knows nothing of padding: it takes each sequence less its mean."""

    layout = "padded"
    causal = False

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(x - x.mean(1, keepdim=True))
        return y


class CausalConvolution(nn.Module):
    """A user's class that says that it is causal."""

    causal = True

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        return y


class TestUserClassWithMask(StockSuite):
    def create(self) -> nn.Module:
        return WithMask()


class TestUserClassWithoutMask(StockSuite):
    def create(self) -> nn.Module:
        return WithoutMask()


class TestUserClassThatIsCausal(StockSuite):
    causal = True

    def create(self) -> nn.Module:
        return CausalConvolution()


class _Windowed(StockSuite):
    """With a working memory of the last inputs: these stream."""

    causal = True
    streams = True
    window = 3

    def native(self, module: nn.Module, x: Tensor) -> Tensor:
        """The definition: each output from a call of its own."""
        rows = [
            self.whole(module, x[:, max(0, t - self.window) : t + 1])[:, -1] for t in range(x.shape[1])
        ]  # the windows
        return torch.stack(rows, 1) if rows else x

    def whole(self, module: nn.Module, x: Tensor) -> Tensor:
        """One sequence ``(1, n, D)``."""
        y: Tensor = module(x, _future(x))
        return y


def _future(x: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)


class TestEncoderLayerWithWindow(_Windowed):
    def create(self) -> nn.Module:
        return nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True)


class TestAttentionWithWindow(_Windowed):
    def create(self) -> nn.Module:
        return nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def whole(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x, x, x, attn_mask=_future(x))[0]
        return y


class TestEncoderWithWindow(_Windowed):
    def create(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class TestGRUWithWindow(_Windowed):
    def create(self) -> nn.Module:
        return nn.GRU(WIDTH, WIDTH, batch_first=True)

    def whole(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x)[0]
        return y


class TestUserClassWithWindow(_Windowed):
    def create(self) -> nn.Module:
        return CausalConvolution()

    def whole(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x)
        return y
