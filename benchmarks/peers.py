"""The peers that the library is measured against."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sma
from benchmarks.shares import settle, watched
from benchmarks.subjects import SyntheticTask
from sma_models.embeddings import SinusoidalPositions, ValueEmbedding


def optional(name: str) -> ModuleType:
    """A package that need not be installed.

    Raises:
        RuntimeError: it is not.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"not available: {error}") from error


class Scaffold(nn.Module):
    """The same embedding and head around every peer: a classifier pools by the mean, a language model ties its head.

    Args:
        task: what to read and predict.
        d_model: width.
        body: from ``(B, L, D)`` to ``(B, L, D)``.
        positions: add sines and cosines to the embedding.
    """

    def __init__(self, task: SyntheticTask, d_model: int, body: nn.Module, *, positions: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.vocab, d_model) if task.vocab else ValueEmbedding(d_model)
        if isinstance(self.embedding, nn.Embedding):
            nn.init.normal_(self.embedding.weight, 0.0, 0.02)
        self.positions = SinusoidalPositions(d_model) if positions else None
        self.body = body
        self.norm = nn.LayerNorm(d_model)
        self.head = None if task.language else nn.Linear(d_model, task.outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.embedding(inputs)
        if self.positions is not None:
            x = x + self.positions(torch.arange(inputs.shape[1], device=inputs.device)[None])
        x = self.norm(self.body(x))
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        logits: Tensor = F.linear(x, weight) if self.head is None else self.head(x.mean(1))
        return logits


class FlashBlock(nn.Module):
    """One layer of a pre-norm Transformer; attention by the fused kernels of PyTorch."""

    def __init__(self, d_model: int, heads: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D)``."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        y: Tensor = x + self.down(F.gelu(self.up(self.ffn_norm(x))))
        return y


def transformer(task: SyntheticTask, layers: int, d_model: int, heads: int, hidden: int) -> nn.Module:
    """A plain pre-norm Transformer, without dropout (which favours it)."""
    blocks = [FlashBlock(d_model, heads, hidden, task.language) for _ in range(layers)]
    return Scaffold(task, d_model, nn.Sequential(*blocks), positions=True)


class Features(nn.Module):
    """A model of flash-linear-attention from embedded tokens to its last features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return features


def linear_attention(kind: str, task: SyntheticTask, **options: Any) -> nn.Module:
    """``GLA`` or ``RetNet`` of flash-linear-attention with its fused kernels.

    Raises:
        RuntimeError: fla is not installed.
    """
    models = optional("fla.models")
    config = getattr(models, f"{kind}Config")(vocab_size=2, use_cache=False, **options)
    return Scaffold(task, config.hidden_size, Features(getattr(models, f"{kind}Model")(config)))


def llama(layers: int, positions: int, **options: Any) -> Any:
    """Hugging Face's Llama of bytes with random weights; keys and values have as many heads as queries.

    Args:
        layers: how many.
        positions: the longest sequence.
        options: the others of ``LlamaConfig``.

    Raises:
        RuntimeError: Transformers is not installed.
    """
    transformers = optional("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        num_hidden_layers=layers,
        num_key_value_heads=options["num_attention_heads"],
        tie_word_embeddings=True,
        max_position_embeddings=positions,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


def load_reference(path: Path | None) -> ModuleType:
    """The published standalone SeqBoat, from its file.

    Raises:
        RuntimeError: no path was given, or the file is not it.
    """
    if path is None:
        raise RuntimeError("not available: --reference PATH says where the published standalone file is")
    found = importlib.util.spec_from_file_location("published_seqboat", path)
    if found is None or found.loader is None or not path.is_file():
        raise RuntimeError(f"not available: {path.name} is no Python file")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    for name in ("SeqBoatLayer", "MultiHeadEMA"):
        if not hasattr(module, name):
            raise RuntimeError(f"not available: {path.name} has no {name}")
    return module


class Published(nn.Module):
    """The published layers with the sizes of one of our specs, between the usual embedding and head.

    They know layer and batch norm only; what our spec does with scale norm they do with layer norm. The decision is
    moved by the bias of the router's logits, which start at zero.
    """

    def __init__(
        self, module: ModuleType, config: Any, task: SyntheticTask, layers: int, length: int, share: float
    ) -> None:
        super().__init__()
        self.share = share
        options = published_options(config, task, length)
        self.layers: list[Any] = [module.SeqBoatLayer(**options) for _ in range(layers)]
        self.model = Scaffold(task, config.d_model, TimeFirst(self.layers))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs)
        return logits

    def settle(self, forward: Callable[[], None]) -> float:
        """Move the routers' biases; returns the share that was reached."""

        def measure() -> Sequence[float]:
            seen: list[float] = []
            with watched([layer.q_router for layer in self.layers], seen):
                forward()
            return seen

        return settle([layer.hx_proj.bias.detach()[1:2] for layer in self.layers], measure, self.share)


class TimeFirst(nn.Module):
    """Layers that want ``(L, B, D)``, one after the other."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1)


def published_options(config: Any, task: SyntheticTask, length: int) -> dict[str, Any]:
    """The arguments of the published layer for the blocks of one of our SeqBoat specs."""
    block = config.blocks[0]
    gau = block.activate.module
    norm = sma.plugins.registry().name_of(block.norm.owner)
    return {
        "embed_dim": config.d_model,
        "zdim": gau.d_qk,
        "hdim": gau.d_v or 2 * config.d_model,
        "ndim": block.mixer.n_state,
        "dropout": block.dropout,
        "attention_activation": gau.activation,
        "bidirectional": not task.language,
        "window_size": gau.window,
        "truncation": block.mixer.truncation,
        "norm_type": "batchnorm" if norm == "batchnorm" else "layernorm",
        "prenorm": block.prenorm,
        "rel_pos_bias": "rotary" if gau.positions == "rotary" else "simple",
        "max_positions": length if gau.positions == "rotary" else gau.max_positions,
        "init_temp_scale": block.activate.configurator.init_temp,
        "local_pos": gau.positions == "local",
    }


class PublishedEMA(nn.Module):
    """The published moving average, batch first."""

    def __init__(self, module: ModuleType, d_model: int, causal: bool) -> None:
        super().__init__()
        self.ema = module.MultiHeadEMA(d_model, ndim=16, bidirectional=not causal)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ema(x.transpose(0, 1)).transpose(0, 1)
        return y


class TopRouter(nn.Module):
    """The experts of each token and their weights, which add up to 1."""

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.n_experts, self.top_k = n_experts, top_k
        self.logits = nn.Linear(d_model, n_experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(T, D)`` to weights and experts, ``(T, k)`` each."""
        weight, choice = self.logits(x).float().softmax(-1).topk(self.top_k, -1)
        return (weight / weight.sum(-1, keepdim=True)).to(x.dtype), choice


class PlainExperts(nn.Module):
    """A mixture of gated experts in the plainest way: sort, ``F.grouped_mm``, add up. No losses of the router."""

    def __init__(self, d_model: int, hidden: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.router = TopRouter(d_model, n_experts, top_k)
        self.up = nn.Parameter(torch.randn(n_experts, d_model, 2 * hidden) * d_model**-0.5)
        self.down = nn.Parameter(torch.randn(n_experts, hidden, d_model) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``(T, D)`` to ``(T, D)``."""
        weight, choice = self.router(x)
        order = choice.flatten().argsort(stable=True)
        experts = torch.arange(self.router.n_experts, device=x.device)
        ends = (choice.flatten()[:, None] == experts).sum(0).cumsum(0).to(torch.int32)
        source = order // self.router.top_k
        gate, value = F.grouped_mm(x[source], self.up, offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * value, self.down, offs=ends)
        return torch.zeros_like(x).index_add(0, source, rows * weight.flatten()[order, None])


class ScatterExperts(nn.Module):
    """The gated experts of ScatterMoE behind the same router."""

    def __init__(self, d_model: int, hidden: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.router = TopRouter(d_model, n_experts, top_k)
        experts = optional("scattermoe.mlp").GLUMLP
        self.experts = experts(input_size=d_model, hidden_size=hidden, num_experts=n_experts, top_k=top_k)

    def forward(self, x: Tensor) -> Tensor:
        """``(T, D)`` to ``(T, D)``."""
        y: Tensor = self.experts(x, *self.router(x))
        return y
