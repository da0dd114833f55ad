"""MoE: a mixture of feed-forward experts, each token going to the k that its router finds most probable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sma.interfaces import Module, ModuleOutput
from sma.runtime.plain import call_router, is_plain
from sma_modules.modules.ffn import ACTIVATIONS, FFN, Activation, compute_dtype
from sma_modules.ops.expert_matmul import activated_expert_matmul, expert_matmul
from sma_modules.ops.expert_order import ExpertOrder, combine, dispatch, order_by_expert
from sma_modules.ops.expert_routing import ChosenExperts, choose_experts


class MoE(Module):
    """Top-k mixture of experts without capacity limit: ``y = sum_i w_i expert_i(x) (+ shared(x))``.

    The router computes ``p = softmax(x @ router)`` in float32 and takes the k most probable experts (at ties the
    first ones); ``w`` is p at these, divided by their sum with ``renormalise`` (Mixtral, arXiv 2401.04088). Losses,
    over T tokens:

    - ``load_balance``: ``E * sum_e f_e P_e``, f_e the share of the T k choices that fell on expert e and P_e the mean
      of p_e (Switch Transformer, arXiv 2101.03961, equations 4 to 6; f divided by k for k above 1). 1 when balanced.
    - ``router_z``: ``mean_t(logsumexp(logits_t)^2)`` (ST-MoE, arXiv 2202.08906, equation 5).

    Both come back with the output, weighted already. There is no capacity limit, so no token is dropped, and a layer
    around the module takes no capacity either. The module can itself be sparsely activated: a token first decides
    whether it needs experts, and then which. :class:`~sma.layer.SparseMixture` with the configurator ``top_k`` is
    another way to the same sum, for modules of different kinds.

    On a GPU nothing synchronises with the device. The choice of experts, the sorting, the movement of rows and the
    activation are kernels. PyTorch's ``grouped_mm`` (bfloat16, compute capability 9.x) or grouped kernels multiply the
    experts, so a CUDA graph can capture a training step. On a CPU the experts are multiplied one after the other.

    Example:
        >>> moe = MoE.Config(n_experts=4, top_k=2, d_hidden=16).build(d_model=8)
        >>> out = moe(torch.randn(5, 8))
        >>> out.output.shape, sorted(out.losses)
        (torch.Size([5, 8]), ['load_balance', 'router_z'])
    """

    layout = "tokens"
    counts_rows = True

    @dataclass(kw_only=True, frozen=True)
    class Config(Module.Config):
        """Options.

        Attributes:
            n_experts: number of experts E.
            top_k: experts per token.
            d_hidden: hidden width of each expert; None for 4 * d_model.
            gated: experts are gated (SwiGLU with ``silu``).
            activation: nonlinearity of the experts.
            renormalise: make the weights of a token's experts add up to 1. Not with ``top_k`` 1, where the weight would
                always be 1 and the router would learn nothing from the output.
            d_shared: hidden width of an expert that every token goes to (DeepSeekMoE, arXiv 2401.06066); None for no
                such expert.
            load_balance_weight: factor on the load-balance loss.
            z_loss_weight: factor on the router's z-loss.
        """

        n_experts: int = 8
        top_k: int = 2
        d_hidden: int | None = None
        gated: bool = True
        activation: Activation = "silu"
        renormalise: bool = True
        d_shared: int | None = None
        load_balance_weight: float = 0.01
        z_loss_weight: float = 0.001

        def __post_init__(self) -> None:
            self.require(self.n_experts >= 1, "n_experts", "must be at least 1")
            self.require(1 <= self.top_k <= self.n_experts, "top_k", f"must be in 1..n_experts = {self.n_experts}")
            self.require(self.d_hidden is None or self.d_hidden >= 1, "d_hidden", "must be None or at least 1")
            self.require(self.d_shared is None or self.d_shared >= 1, "d_shared", "must be None or at least 1")
            self.require(self.activation in ACTIVATIONS, "activation", f"must be one of {', '.join(ACTIVATIONS)}")
            self.require(not (self.renormalise and self.top_k == 1), "renormalise", "must be False with top_k 1")
            self.require(self.load_balance_weight >= 0, "load_balance_weight", "must not be negative")
            self.require(self.z_loss_weight >= 0, "z_loss_weight", "must not be negative")

    config: Config

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        d_hidden = 4 * d_model if config.d_hidden is None else config.d_hidden
        self.act = ACTIVATIONS[config.activation]
        self.router = nn.Linear(d_model, config.n_experts, bias=False)
        self.up = nn.Parameter(torch.empty(config.n_experts, d_model, d_hidden))
        self.gate = nn.Parameter(torch.empty(config.n_experts, d_model, d_hidden)) if config.gated else None
        self.down = nn.Parameter(torch.empty(config.n_experts, d_hidden, d_model))
        self.shared: FFN | None = None
        if config.d_shared is not None:
            self.shared = FFN.Config(
                d_hidden=config.d_shared, activation=config.activation, gated=config.gated, bias=False
            ).build(d_model=d_model, causal=causal)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert like ``nn.Linear``: uniform within 1 / sqrt(inputs)."""
        for parameter in (self.up, self.gate, self.down):
            if parameter is not None:
                bound = parameter.shape[1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> ModuleOutput:
        """``x (T, D)`` to the same shape, with the two losses, already weighted."""
        choice = choose_experts(self._logits(x), self.config.top_k, self.config.renormalise)
        order = order_by_expert(choice.expert, self.config.n_experts)
        y = combine(self._experts(dispatch(x.to(compute_dtype(x)), order), order), choice.weight, order)
        if self.shared is not None:
            y = y + self.shared(x)
        return ModuleOutput(y, losses=self._losses(choice, order.counts))

    def _experts(self, rows: Tensor, order: ExpertOrder) -> Tensor:
        """Every row through its expert."""

        def times(rows: Tensor, matrices: Tensor) -> Tensor:
            return expert_matmul(rows, matrices.to(rows.dtype), order.counts, order.ends)

        up, gate = times(rows, self.up), None if self.gate is None else times(rows, self.gate)
        down = self.down.to(up.dtype)
        return activated_expert_matmul(up, gate, self.config.activation, down, order.counts, order.ends)

    def _logits(self, x: Tensor) -> Tensor:
        """``(T, E)`` in float32, or float64 for float64 inputs: rounding decides which experts are chosen."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if not is_plain(self.router):
            return call_router(self.router, x).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.router.weight.to(dtype))

    def _losses(self, choice: ChosenExperts, counts: Tensor) -> dict[str, Tensor]:
        share = counts.to(choice.probability.dtype) / max(choice.expert.numel(), 1)
        balance = self.config.n_experts * (share * choice.probability).sum()
        return {
            "load_balance": self.config.load_balance_weight * balance,
            "router_z": self.config.z_loss_weight * choice.square,
        }
