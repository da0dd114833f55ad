"""The layers that activate modules sparsely: one module, or a sum over several.

One layer does: configure -> compress -> module -> extract, weighted by the confidence. ``sum_i a_t[i] * c_t[i] * f_i``
of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sma.activated import Activated, ActivatedState
from sma.configurable import BaseConfig
from sma.configurators.budget import RateController, RateLoss
from sma.configurators.tempered_softmax import TemperedSoftmax
from sma.decision import LogitSource, route_tokens, score_tokens
from sma.errors import ConfigError, ShapeError, StreamingError
from sma.interfaces import Configurator, Layout, Module
from sma.ops.combine import combine
from sma.ops.compress import compress_through
from sma.padding import check_lengths
from sma.routing import Packed, Routing
from sma.runtime.plain import unwrapped
from sma.state import State
from sma.working_memory import WorkingMemory
from sma.wrap.layouts import check_supported, infer_layout, infer_width
from sma.wrap.stock import call_module
from sma.wrap.windows import call_windowed


class MemberOutput(NamedTuple):
    """The output of one module of a sparsely activated layer.

    Attributes:
        output: ``(K, D)``, one row for each active token, not yet weighted.
        packed: where the rows belong.
        weight: ``(B, L)`` confidence.
    """

    output: Tensor
    packed: Packed
    weight: Tensor


class MemberOutputs(NamedTuple):
    """A sparsely activated layer before its outputs are put back, for blocks that fuse that into what follows.

    Attributes:
        members: the output of each module.
        x: the tokens that came in, passed through: use these from here on, in one matrix product
            (:func:`~sma.ops.compress.compress_through` says why).
        state: streaming state after this chunk.
        routing: the decision.
        losses: auxiliary losses by name.
    """

    members: tuple[MemberOutput, ...]
    x: Tensor
    state: ActivatedState | None
    routing: Routing
    losses: dict[str, Tensor]


class _LazyRouter(nn.LazyLinear):
    """A router that takes its width from the first tokens it sees."""

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params() and self.in_features:
            init_router(self)


def init_router(router: nn.Linear) -> None:
    """Weights from N(0, 0.02) truncated at two standard deviations, bias zero."""
    nn.init.trunc_normal_(router.weight, 0.0, 0.02, -0.04, 0.04)
    nn.init.zeros_(router.bias)


class SparseMixture(nn.Module):
    """``M`` modules, each run on the tokens that activate it; the outputs add up, weighted by the confidence.

    With one module and GAU this is SeqBoat's layer, with M feed-forward networks and ``top_k`` a mixture of experts,
    with one feed-forward network a mixture-of-depths layer with a causal router.

    Args:
        modules: the modules to activate; any ``nn.Module`` that works token by token, any
            :class:`~sma.interfaces.Module`, and the stock sequence modules of torch.
        configurator: takes the decision; by default the paper's tempered softmax.
        d_model: width of the tokens; inferred from the modules, or taken from the first input.
        layouts: layout of each module, where it should not be inferred.
        causal: the output at t may depend on positions up to t only; refuses what cannot keep that.
        router: False when the caller supplies the ``logits``.
        rate_loss: optional loss that holds the rate of activation at a target.
        controller: optional controller that holds it instead; the layer only keeps it, the training loop calls its
            ``update``.

    Raises:
        ConfigError: the parts do not fit together.

    Example:
        >>> layer = SparseMixture([nn.Linear(8, 8), nn.Linear(8, 8)], causal=True)
        >>> layer(torch.randn(2, 5, 8)).output.shape
        torch.Size([2, 5, 8])
    """

    _single: ClassVar[bool] = False
    _makes_parameters = False  # at the next call, from the width of its tokens
    module: nn.Module
    members: nn.ModuleList

    def __init__(
        self,
        modules: Sequence[nn.Module],
        configurator: Configurator | None = None,
        *,
        d_model: int | None = None,
        layouts: Sequence[Layout | None] | None = None,
        causal: bool = False,
        router: bool = True,
        rate_loss: RateLoss | None = None,
        controller: RateController | None = None,
    ) -> None:
        super().__init__()
        if not modules:
            raise ConfigError(f"{type(self).__name__}: modules must hold at least one module, got none")
        for module in modules:
            if not isinstance(module, nn.Module):
                raise ConfigError(f"{type(self).__name__}: a module must be an nn.Module, got {module!r}")
        self.causal = causal
        if layouts is not None and len(layouts) != len(modules):
            raise ConfigError(f"{type(self).__name__}: layouts must hold {len(modules)}, one a module, got {layouts!r}")
        self.layouts: list[Layout] = [
            infer_layout(module) if stated is None else stated
            for module, stated in zip(modules, layouts or [None] * len(modules), strict=True)
        ]
        for module, layout in zip(modules, self.layouts, strict=True):
            check_supported(module, layout, causal)
        self._own(modules)
        self.configurator = configurator or TemperedSoftmax(TemperedSoftmax.Config(), n_modules=len(modules))
        self.rate_loss = rate_loss
        self.controller = controller
        self._check_configurator(len(modules))
        self.d_model = d_model or next((width for width in map(infer_width, modules) if width), None)
        self._width_known = False
        self._admitted: tuple[object, ...] | None = None  # signature of the last input that was checked
        self.capacity: float | None = None
        self.capacity_streams = False
        self.window: int | None = None
        self.router = self._make_router() if router and self.configurator.logits_per_module else None
        if self.d_model is not None:
            self._know_width(self.d_model)
        self._makes_parameters = self.d_model is None or any(map(is_lazy, self.parameters()))

    def _check_configurator(self, n_modules: int) -> None:
        configurator = self.configurator
        name = type(configurator).__name__
        if configurator.n_modules != n_modules:
            raise ConfigError(f"configurator: decides on {configurator.n_modules} modules, the layer has {n_modules}")
        if self.causal and not configurator.causal:
            raise ConfigError(f"configurator: {name} looks ahead, it is refused in a causal layer")
        given = "rate_loss" if self.rate_loss else "controller" if self.controller else None
        if given and not configurator.adjustable:
            raise ConfigError(f"{given}: must not be given with {name}, whose rate is fixed")

    def with_capacity(self, share: float | None, *, streams: bool = False) -> Self:
        """Fix how many rows each module has: shapes are static then, and nothing synchronises with the device.

        The results are the same as long as the capacity suffices. If it does not, the first active tokens of the batch
        have rows, the others are dropped and not active, and :attr:`Routing.overflow` counts them. A replayed decision
        ignores it.

        Args:
            share: of the tokens of a batch, padding included, in (0, 1]; None for as many as are active.
            streams: chunks of a stream obey it too. By default they ignore it, as chunks may be short.

        Raises:
            ConfigError: the share is out of range, or rows without a token would change the result of a module.

        Example:
            >>> layer = SparselyActivated(nn.Linear(8, 8)).with_capacity(0.5)
            >>> layer(torch.randn(2, 10, 8)).routing.packed[0].index.shape
            torch.Size([10])
        """
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"{type(self).__name__}: capacity must lie in (0, 1] or be None, got {share}")
        reason = None if share is None else self._why_no_capacity()
        if reason is not None:
            raise ConfigError(f"{type(self).__name__}: capacity must be None, got {share}: {reason}")
        self.capacity, self.capacity_streams = share, streams
        return self

    def with_window(self, window: int | None) -> Self:
        """Give modules of layout "padded" a working memory: what comes out at a token is what the module gives at the
        end of the last ``window`` activated tokens and this one. Such a layer streams.

        Args:
            window: activated tokens before the own one, at least 1; None for all of them.

        Raises:
            ConfigError: the window is out of range, the layer is not causal, or no module is of that layout.

        Example:
            >>> encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            >>> layer = SparselyActivated(encoder, causal=True).with_window(4).eval()
            >>> layer(torch.randn(2, 1, 8), layer.initial_state(2, torch.zeros(()))).output.shape
            torch.Size([2, 1, 8])
        """
        name = type(self).__name__
        if window is not None and window < 1:
            raise ConfigError(f"{name}: window must be at least 1 or None, got {window}")
        if window is not None and not self.causal:
            raise ConfigError(f"{name}: window must be None in a layer that is not causal, got {window}")
        if window is not None and "padded" not in self.layouts:
            raise ConfigError(f"{name}: window is for modules of layout 'padded', the layouts are {self.layouts}")
        self.window = window
        return self

    def _why_no_capacity(self) -> str | None:
        """Why rows without a token would change the results, or None."""
        for module, layout in zip(self.activated_modules, self.layouts, strict=True):
            name = type(module).__name__
            if layout == "padded":
                return f"{name} takes rows as long as the longest sequence (layout 'padded')"
            if getattr(module, "counts_rows", False):
                return f"{name} computes a loss over all rows; padding rows would change it"
            if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
                return f"{name} normalises over all rows; padding rows would change it"
        return None

    def _own(self, modules: Sequence[nn.Module]) -> None:
        self.members = nn.ModuleList(modules)

    @property
    def activated_modules(self) -> list[nn.Module]:
        """The modules that are activated, in their order."""
        return [self.module] if self._single else list(self.members)

    def _make_router(self) -> nn.Linear:
        out_features = self.configurator.n_modules * self.configurator.logits_per_module
        if self.d_model is None:
            return _LazyRouter(out_features)
        router = nn.Linear(self.d_model, out_features)
        init_router(router)
        return router

    def _know_width(self, d_model: int) -> None:
        self.d_model = d_model
        self._width_known = True
        self.configurator.reset(d_model)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Weights that were loaded before the width is known must not be initialised again afterwards.
        weight = state_dict.get(f"{prefix}router.weight")
        if not self._width_known and weight is not None and not is_lazy(weight):
            self.d_model, self._width_known = weight.shape[1], True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def why_not_streaming(self) -> str | None:
        """The reason why the layer cannot run chunk by chunk, or None when it can."""
        if not self.configurator.causal:
            return f"configurator {type(self.configurator).__name__} looks ahead"
        for module, layout in zip(self.activated_modules, self.layouts, strict=True):
            inner = unwrapped(module)
            name = type(inner).__name__
            if layout == "padded" and self.window is None:
                return f"{name} keeps no bounded working memory (layout 'padded'; with_window gives it one)"
            if layout == "packed" and not isinstance(inner, Module):
                return f"{name} keeps no bounded working memory (it is no sma.Module, layout {layout!r})"
            if isinstance(inner, Module) and layout == "packed" and not (inner.causal and inner.streams):
                return f"{name} {'has no bounded memory' if inner.causal else 'looks ahead'}"
        return None

    def initial_state(self, batch: int, like: Tensor) -> ActivatedState:
        """The state before the first token.

        Args:
            batch: number of sequences.
            like: a tensor on the device and in the dtype of the tokens.

        Raises:
            StreamingError: the layer cannot stream; the message says why.
        """
        reason = self.why_not_streaming()
        if reason is not None:
            raise StreamingError(f"{type(self).__name__}: cannot stream: {reason}")
        members = tuple(
            self._empty(*each, batch, like) for each in zip(self.activated_modules, self.layouts, strict=True)
        )
        return ActivatedState(torch.zeros(batch, dtype=torch.int64, device=like.device), members)

    def _empty(self, module: nn.Module, layout: Layout, batch: int, like: Tensor) -> State | None:
        """The state of a module before the first token."""
        if layout == "padded" and self.window is not None:
            if self.d_model is None:
                raise StreamingError(f"{type(self).__name__}: cannot stream before the width of the tokens is known")
            return WorkingMemory.empty(batch, self.window, like.new_empty(0, self.d_model))
        inner = unwrapped(module)
        return inner.initial_state(batch, like) if isinstance(inner, Module) else None

    def forward(
        self,
        x: Tensor,
        state: ActivatedState | None = None,
        *,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        logits: Tensor | None = None,
        replay: Routing | None = None,
    ) -> Activated:
        """Run the modules on the tokens that activate them.

        Args:
            x: ``(B, L, D)`` floating point.
            state: from :meth:`initial_state` or the previous chunk; None runs whole sequences and returns no state.
            valid: ``(B, L)`` bool, True on real tokens; None means all.
            lengths: ``(B,)`` int64 real tokens of each row, instead of ``valid`` where all padding is on the right.
            logits: ``(B, L, M * logits_per_module)``, instead of the layer's own router.
            replay: a routing whose decision is taken over; the confidence is computed anew.

        Raises:
            ShapeError: ``x``, ``valid``, ``lengths`` or ``logits`` have the wrong shape or dtype, or are not finite.
            StreamingError: a state was passed and the layer cannot stream, or the state is of another batch.
            RoutingError: ``replay`` does not fit the input.
        """
        source = None if logits is None else LogitSource(logits=logits)
        out = self.run_members(x, state, valid=valid, lengths=lengths, source=source, replay=replay)
        total: Tensor | None = None
        for output, packed, weight in out.members:
            total = combine(output, packed, weight=weight, skip=total)
        assert total is not None
        return Activated(total, out.state, out.routing, out.losses)

    def run_members(
        self,
        x: Tensor,
        state: ActivatedState | None = None,
        *,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        source: LogitSource | None = None,
        replay: Routing | None = None,
    ) -> MemberOutputs:
        """The same up to the modules' outputs, for a block that does the rest by :func:`~sma.ops.combine.combine`.

        The layer is not called here, so that this is only for one that is :func:`plain <sma.runtime.plain.is_plain>`.

        Args:
            x: as for :meth:`forward`, like the others that are not listed here.
            state: see there.
            valid: see there.
            lengths: see there.
            source: of the logits, instead of the layer's own router.
            replay: see there.
        """
        if self._makes_parameters and torch.is_inference_mode_enabled():
            # What is made in inference mode can never be trained.
            with torch.inference_mode(False), torch.no_grad():
                return self.run_members(x.clone(), state, valid=valid, lengths=lengths, source=source, replay=replay)
        self._admit(x, valid, lengths, state)
        if source is None:
            if isinstance(self.router, _LazyRouter):
                self.router(x[:0])
            source = LogitSource(self.router)
        seen = None if state is None else state.seen
        scored = score_tokens(type(self).__name__, self.configurator, x, source, valid, lengths, seen)
        capacity = self.capacity if replay is None and (state is None or self.capacity_streams) else None
        routing, scored = route_tokens(self.configurator, scored, replay=replay, capacity=capacity)
        losses = {} if self.rate_loss is None else {"rate": self.rate_loss(scored.score, routing.active, scored.valid)}
        x, modules = scored.x, [self.module] if self._single else list(self.members)
        one = len(modules) == 1
        confidence = (routing.confidence.squeeze(-1),) if one else routing.confidence.unbind(-1)
        members: list[MemberOutput] = []
        states: list[State | None] = []
        for m, module in enumerate(modules):
            packed, before = routing.packed[m], None if state is None else state.members[m]
            if m == 0 and scored.tokens is not None:
                tokens = scored.tokens
            else:
                tokens, x = compress_through(x, packed)
            if self.window is not None and self.layouts[m] == "padded":
                result = call_windowed(module, tokens, packed, before, self.window)
            else:
                result = call_module(module, self.layouts[m], tokens, packed, before, self.causal)
            members.append(MemberOutput(result.output, packed, confidence[m]))
            states.append(result.state)
            for name, loss in result.losses.items():
                losses[name if one else f"{m}.{name}"] = loss
        after = None
        if state is not None:
            taken = scored.valid.sum(1) if scored.padded else x.shape[1]
            after = ActivatedState(state.seen + taken, tuple(states))
        if self._makes_parameters:
            self._makes_parameters = False
        return MemberOutputs(tuple(members), x, after, routing, losses)

    def _admit(
        self,
        x: Tensor,
        valid: Tensor | None,
        lengths: Tensor | None,
        state: ActivatedState | None,
    ) -> None:
        """Check the input, unless one of the same signature went through last time."""
        router = self.router
        lazy = router is None or isinstance(router, _LazyRouter)
        weight = None if lazy or router is None else router._parameters.get("weight")
        signature = None
        # An input of another dtype than the weights is accepted under autocast only, which may be off at the next call.
        if valid is None and lengths is None and state is None and (weight is None or weight.dtype == x.dtype):
            signature = x.shape, x.dtype, x.device, None if weight is None else weight.device
            if signature == self._admitted and not torch.compiler.is_compiling():
                return
        self._check(x, valid, lengths, state, weight)
        if not torch.compiler.is_compiling():
            self._admitted = signature
        if not self._width_known:
            self._know_width(x.shape[-1])

    def _check(
        self,
        x: Tensor,
        valid: Tensor | None,
        lengths: Tensor | None,
        state: ActivatedState | None,
        weight: Tensor | None,
    ) -> None:
        name = type(self).__name__
        if x.dim() != 3 or not x.is_floating_point():
            raise ShapeError(f"{name}: x must be floating point with shape (B, L, D), got {x.dtype} {tuple(x.shape)}")
        if self.d_model is not None and x.shape[-1] != self.d_model:
            raise ShapeError(f"{name}: x must have d_model = {self.d_model} features, got {tuple(x.shape)}")
        # The router stands for all weights; modules may mix dtypes, and may run in several.
        if weight is not None:
            if x.device != weight.device:
                raise ShapeError(f"{name}: x must be on the device of the layer, {weight.device}, got {x.device}")
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                raise ShapeError(f"{name}: x must be {weight.dtype} like the layer, got {x.dtype}")
        if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape[:2]):
            raise ShapeError(
                f"{name}: valid must be bool of shape {tuple(x.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}"
            )
        if valid is not None and valid.device != x.device:
            raise ShapeError(f"{name}: valid must be on the device of x, {x.device}, got {valid.device}")
        check_lengths(lengths, valid, (x.shape[0], x.shape[1]), x.device)
        if state is not None:
            reason = self.why_not_streaming()
            if reason is not None:
                raise StreamingError(f"{name}: cannot stream: {reason}")
            if state.seen.shape[0] != x.shape[0]:
                raise StreamingError(f"{name}: the state is of a batch of {state.seen.shape[0]}, x of {x.shape[0]}")

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, layouts={self.layouts}, causal={self.causal}"


class SparselyActivated(SparseMixture):
    """One module that runs only on the tokens that activate it. Wrap any module; nothing else is needed.

    Args:
        module: the module.
        configurator: takes the decision; by default the paper's tempered softmax.
        layout: where it should not be inferred: ``tokens``, ``packed`` or ``padded``.
        **options: as for :class:`SparseMixture`.

    Example:
        >>> ffn = SparselyActivated(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)))
        >>> x = torch.randn(2, 10, 16)
        >>> y = x + ffn(x).output
    """

    _single = True

    def __init__(
        self,
        module: nn.Module,
        configurator: Configurator | None = None,
        *,
        layout: Layout | None = None,
        **options: Any,
    ) -> None:
        super().__init__([module], configurator, layouts=[layout], **options)

    def _own(self, modules: Sequence[nn.Module]) -> None:
        self.module = modules[0]


@dataclass(kw_only=True, frozen=True)
class ActivatedConfig(BaseConfig):
    """A sparsely activated module in a spec.

    Attributes:
        module: what to activate.
        configurator: takes the decision.
        rate_loss: optional loss towards a target rate.
        controller: optional controller of the rate, applied by the training loop.
        capacity: share of the tokens that each module has rows for, see :meth:`SparseMixture.with_capacity`; None for
            as many as are active.
    """

    module: Module.Config
    configurator: Configurator.Config = field(default_factory=TemperedSoftmax.Config)
    rate_loss: RateLoss.Config | None = None
    controller: RateController.Config | None = None
    capacity: float | None = None

    def __post_init__(self) -> None:
        self.require(self.capacity is None or 0 < self.capacity <= 1, "capacity", "must lie in (0, 1] or be null")

    def build(self, *, d_model: int, causal: bool = False, router: bool = True) -> SparselyActivated:  # type: ignore[override]  # says what it needs
        """Construct the layer for tokens of width ``d_model``."""
        return SparselyActivated(
            self.module.build(d_model=d_model, causal=causal),
            self.configurator.build(n_modules=1),
            d_model=d_model,
            causal=causal,
            router=router,
            rate_loss=self.rate_loss.build() if self.rate_loss else None,
            controller=self.controller.build() if self.controller else None,
        ).with_capacity(self.capacity)


@dataclass(kw_only=True, frozen=True)
class MixtureConfig(BaseConfig):
    """Several modules under one configurator in a spec; the fields as in :class:`ActivatedConfig`."""

    modules: tuple[Module.Config, ...]
    configurator: Configurator.Config = field(default_factory=TemperedSoftmax.Config)
    rate_loss: RateLoss.Config | None = None
    controller: RateController.Config | None = None
    capacity: float | None = None

    def __post_init__(self) -> None:
        self.require(len(self.modules) > 0, "modules", "must not be empty")
        self.require(self.capacity is None or 0 < self.capacity <= 1, "capacity", "must lie in (0, 1] or be null")

    def build(self, *, d_model: int, causal: bool = False, router: bool = True) -> SparseMixture:  # type: ignore[override]  # says what it needs
        """Construct the layer for tokens of width ``d_model``."""
        return SparseMixture(
            [module.build(d_model=d_model, causal=causal) for module in self.modules],
            self.configurator.build(n_modules=len(self.modules)),
            d_model=d_model,
            causal=causal,
            router=router,
            rate_loss=self.rate_loss.build() if self.rate_loss else None,
            controller=self.controller.build() if self.controller else None,
        ).with_capacity(self.capacity)


def prefixed(prefix: str, items: Mapping[str, Any]) -> dict[str, Any]:
    """``items`` with ``prefix.`` before every name."""
    return {f"{prefix}.{name}" if name else prefix: value for name, value in items.items()}
