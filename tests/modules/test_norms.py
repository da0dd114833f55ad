"""The norms against torch's own and their formulas; batch norm over real tokens only, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sma import Norm
from sma.errors import ConfigError, ShapeError
from sma_modules.norms import BatchNorm, LayerNorm, RMSNorm, ScaleNorm, SyncBatchNorm

FEATURE = [LayerNorm, RMSNorm, ScaleNorm]
BATCH = [BatchNorm, SyncBatchNorm]


def randomised(norm: Norm) -> Norm:
    """Away from the initial ones and zeros."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm.double()


def expected(norm: Norm, x: Tensor) -> Tensor:
    eps = norm.config.eps
    if isinstance(norm, LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if norm.config.affine:
        y = y * norm.weight
        y = y + norm.bias if isinstance(norm, LayerNorm) else y
    return y


@pytest.mark.parametrize("cls", FEATURE)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 0, 6), (0, 3, 6)])
def test_feature_norms(cls: type[Norm], affine: bool, shape: tuple[int, ...]) -> None:
    norm = randomised(cls.Config(affine=affine, eps=0.1).build(d_model=6))
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(norm(x, lengths=None), expected(norm, x))
    names = {"weight", "bias"} if cls is LayerNorm else {"weight"}
    assert set(norm.state_dict()) == (names if affine else set())


def test_scalenorm_has_one_number() -> None:
    assert ScaleNorm.Config().build(d_model=6).weight.shape == (1,)


@pytest.mark.parametrize("cls", [*FEATURE, *BATCH])
def test_gradcheck(cls: type[Norm]) -> None:
    norm = randomised(cls.Config().build(d_model=3))
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 2])
    assert torch.autograd.gradcheck(lambda value, *_: norm(value, lengths=lengths), (x, *norm.parameters()))


@pytest.mark.parametrize("cls", [*FEATURE, *BATCH])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(cls: type[Norm], dtype: torch.dtype) -> None:
    norm = cls.Config().build(d_model=64)
    x = (3 * torch.randn(4, 16, 64)).to(dtype)
    exact = cls.Config().build(d_model=64).double()(x.double())
    y = norm(x)
    assert y.dtype == dtype
    error, rounding = (y.double() - exact).abs(), (exact.to(dtype).double() - exact).abs()
    assert error.max() <= 2 * rounding.max()
    assert error.mean() <= 2 * rounding.mean()


@pytest.mark.parametrize("cls", BATCH)
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_sees_real_tokens_only(cls: type[BatchNorm], affine: bool) -> None:
    norm = cls.Config(affine=affine, momentum=0.3, eps=1e-3).build(d_model=6).double()
    torch_norm = nn.BatchNorm1d(6, affine=affine, momentum=0.3, eps=1e-3).double()
    torch_norm.load_state_dict(norm.state_dict())  # the same keys
    for _ in range(3):
        x = torch.randn(3, 5, 6, dtype=torch.float64)
        lengths = torch.tensor([5, 0, 3])
        real = torch.arange(5) < lengths[:, None]
        x[~real] = torch.nan
        y = norm(x, lengths=lengths)
        torch.testing.assert_close(y[real], torch_norm(x[real]))
        assert y.isfinite().all()
        for key, value in torch_norm.state_dict().items():
            torch.testing.assert_close(norm.state_dict()[key], value)
    norm.eval()
    torch_norm.eval()
    torch.testing.assert_close(norm(x, lengths=lengths)[real], torch_norm(x[real]))


@pytest.mark.parametrize("cls", BATCH)
def test_packing_order_and_padding_do_not_matter(cls: type[BatchNorm]) -> None:
    norm = cls.Config().build(d_model=4).double()
    rows = [torch.randn(size, 4, dtype=torch.float64) for size in (3, 6)]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    y = norm(padded, lengths=torch.tensor([3, 6]))
    packed = norm(torch.cat(rows)[None])
    torch.testing.assert_close(torch.cat([y[0, :3], y[1]]), packed[0])


@pytest.mark.parametrize("cls", BATCH)
@pytest.mark.parametrize("count", [0, 1])
def test_batch_norm_without_a_variance(cls: type[BatchNorm], count: int) -> None:
    norm = cls.Config().build(d_model=4)
    norm.running_mean.fill_(2.0)
    x = torch.randn(1, 3, 4, requires_grad=True)
    y = norm(x, lengths=torch.tensor([count]))
    torch.testing.assert_close(y[:, :count], (x[:, :count] - 2) / (1 + 1e-5) ** 0.5)
    assert norm.num_batches_tracked == 0
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *norm.parameters()])


def _rank(rank: int, folder: str, tokens: list[Tensor]) -> None:
    """One of two ranks: its own row, the gradient of a loss that weighs all outputs differently."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    norm = SyncBatchNorm.Config().build(d_model=3).double()
    results = []
    for x in tokens[rank::2]:
        x = x[None].requires_grad_()
        y = norm(x, lengths=torch.tensor([x.shape[1]]))
        (y**3).sum().backward()
        results.append((y.detach()[0], x.grad[0]))
    torch.save((results, dict(norm.state_dict())), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one_batch(tmp_path: Path) -> None:
    """Also when the ranks have different numbers of tokens, or none."""
    tokens = [torch.randn(size, 3, dtype=torch.float64) for size in (4, 7, 0, 5)]
    torch.multiprocessing.spawn(_rank, (str(tmp_path), tokens), nprocs=2)
    loaded = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    norm = BatchNorm.Config().build(d_model=3).double()
    for step in (0, 1):
        x = torch.cat(tokens[2 * step : 2 * step + 2])[None].requires_grad_()
        y = norm(x)
        (y**3).sum().backward()
        torch.testing.assert_close(torch.cat([results[step][0] for results, _ in loaded]), y[0])
        torch.testing.assert_close(torch.cat([results[step][1] for results, _ in loaded]), x.grad[0])
    for _, state in loaded:
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(state[key], norm.state_dict()[key])


@pytest.mark.parametrize("cls", [*FEATURE, *BATCH])
def test_wrong_width_is_refused(cls: type[Norm]) -> None:
    with pytest.raises(ShapeError, match=cls.__name__):
        cls.Config().build(d_model=4)(torch.zeros(1, 2, 5))
    with pytest.raises(ConfigError, match="eps: must be positive, got 0"):
        cls.Config(eps=0.0)
