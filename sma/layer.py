"""The layers that activate modules sparsely: one module, or a sum over several.

One layer does: configure -> compress -> module -> extract, weighted by the confidence. ``sum_i a_t[i] * c_t[i] * f_i``
of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sma.activated import Activated, ActivatedState
from sma.configurable import BaseConfig
from sma.configurators.budget import RateController, RateLoss
from sma.configurators.tempered_softmax import TemperedSoftmax
from sma.decision import Weights, route_tokens, score_tokens, weights_of
from sma.decode.choice import module_stepper
from sma.decode.fallback import WindowedModule
from sma.decode.mixture import MixtureStepper
from sma.errors import ConfigError, ShapeError, StreamingError
from sma.interfaces import Configurator, Layout, Module
from sma.ops.combine import combine
from sma.ops.compress import compress_through
from sma.padding import check_lengths
from sma.routing import Packed, Routing
from sma.state import State
from sma.steppers import ModuleStepper, SlotSpec
from sma.working_memory import WorkingMemory
from sma.wrap.layouts import check_supported, infer_layout, infer_width
from sma.wrap.stock import call_module
from sma.wrap.windows import call_windowed


class Part(NamedTuple):
    """What one module of a sparsely activated layer gave.

    Attributes:
        output: ``(K, D)``, one row for each active token, not yet weighted.
        packed: where the rows belong.
        weight: ``(B, L)`` confidence.
    """

    output: Tensor
    packed: Packed
    weight: Tensor


class Parts(NamedTuple):
    """A sparsely activated layer before its outputs are put back, for blocks that fuse that into what follows.

    Attributes:
        members: what each module gave.
        x: the tokens that came in, passed through: use these from here on, in one matrix product
            (:func:`~sma.ops.compress.compress_through` says why).
        state: streaming state after this chunk.
        routing: who was active.
        losses: auxiliary losses by name.
    """

    members: tuple[Part, ...]
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
        configurator: who decides; by default the paper's tempered softmax.
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
        self.layouts: list[Layout] = [
            stated or infer_layout(module)
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
        self.capacity: float | None = None
        self.capacity_streams = False
        self.window: int | None = None
        self.router = self._make_router() if router and self.configurator.logits_per_module else None
        if self.d_model is not None:
            self._know_width(self.d_model)

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
        """Fix how many tokens each module has room for: shapes are static then, and nothing is read back.

        The results are the same as long as the spec suffices. If it does not, the first active tokens of the batch
        get it, the others are not active, and :attr:`Routing.overflow` counts them. A replayed decision ignores it.

        Args:
            share: of the tokens of a batch, padding included, in (0, 1]; None for as many as are active.
            streams: chunks of a stream obey it too. By default they ignore it, as chunks may be short.

        Raises:
            ConfigError: the share is out of range, or a module would notice rows without a token.

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
        for module, layout in zip(self._members, self.layouts, strict=True):
            name = type(module).__name__
            if layout == "padded":
                return f"{name} takes rows as long as the longest sequence"
            if getattr(module, "counts_rows", False):
                return f"{name} takes losses over all rows"
            if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
                return f"{name} normalises over all rows"
        return None

    def _own(self, modules: Sequence[nn.Module]) -> None:
        self.members = nn.ModuleList(modules)

    @property
    def _members(self) -> list[nn.Module]:
        return list(self.members)

    def _make_router(self) -> nn.Linear:
        out_features = self.configurator.n_modules * self.configurator.logits_per_module
        if self.d_model is None:
            return _LazyRouter(out_features)
        router = nn.Linear(self.d_model, out_features)
        init_router(router)
        return router

    def _know_width(self, d_model: int) -> None:
        if not self._width_known:
            self.d_model = d_model
            self._width_known = True
            self.configurator.reset(d_model)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # What is loaded before the width is known must not be initialised again once it is.
        weight = state_dict.get(f"{prefix}router.weight")
        if not self._width_known and weight is not None and not is_lazy(weight):
            self.d_model, self._width_known = weight.shape[1], True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def why_not_streaming(self) -> str | None:
        """The reason why the layer cannot run chunk by chunk, or None when it can."""
        if not self.configurator.causal:
            return f"configurator {type(self.configurator).__name__} looks ahead"
        for module, layout in zip(self._members, self.layouts, strict=True):
            name = type(module).__name__
            if layout == "padded" and self.window is None:
                return f"{name} keeps no bounded working memory (layout 'padded'; with_window gives it one)"
            if layout == "packed" and not isinstance(module, Module):
                return f"{name} keeps no bounded working memory (it is no sma.Module, layout {layout!r})"
            if isinstance(module, Module) and layout == "packed" and not (module.causal and module.streams):
                return f"{name} {'has no bounded memory' if module.causal else 'looks ahead'}"
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
        members = tuple(self._empty(*each, batch, like) for each in zip(self._members, self.layouts, strict=True))
        return ActivatedState(torch.zeros(batch, dtype=torch.int64, device=like.device), members)

    def _empty(self, module: nn.Module, layout: Layout, batch: int, like: Tensor) -> State | None:
        """The state of a module before the first token."""
        if layout == "padded" and self.window is not None:
            if self.d_model is None:
                raise StreamingError(f"{type(self).__name__}: cannot stream before the width of the tokens is known")
            return WorkingMemory.empty(batch, self.window, like.new_empty(0, self.d_model))
        return module.initial_state(batch, like) if isinstance(module, Module) else None

    def stepper(self, spec: SlotSpec) -> MixtureStepper:
        """What decodes with this layer's weights.

        Raises:
            StreamingError: the layer cannot stream; the message says why.
        """
        reason = self.why_not_streaming()
        if reason is not None:
            raise StreamingError(f"{type(self).__name__}: cannot stream: {reason}")
        members = tuple(self._stepper(*each, spec) for each in zip(self._members, self.layouts, strict=True))
        return MixtureStepper(self.configurator, self.router, members, spec)

    def _stepper(self, module: nn.Module, layout: Layout, spec: SlotSpec) -> ModuleStepper:
        if layout == "padded" and self.window is not None:
            return WindowedModule(module, self.window, self._empty(module, layout, spec.slots, spec.like), spec)
        return module_stepper(module, layout, spec)

    def forward(
        self,
        x: Tensor,
        state: ActivatedState | None = None,
        *,
        valid: Tensor | None = None,
        logits: Tensor | None = None,
        replay: Routing | None = None,
    ) -> Activated:
        """Run the modules on the tokens that activate them.

        Args:
            x: ``(B, L, D)`` floating point.
            state: from :meth:`initial_state` or the previous chunk; None runs whole sequences and returns no state.
            valid: ``(B, L)`` bool, True on real tokens; None means all.
            logits: ``(B, L, M * logits_per_module)``, instead of the layer's own router.
            replay: a routing whose decision is taken over; the confidence is computed anew.

        Raises:
            ShapeError: ``x``, ``valid`` or ``logits`` have the wrong shape or dtype, or are not finite.
            StreamingError: a state was passed and the layer cannot stream, or the state is of another batch.
            RoutingError: ``replay`` does not fit the input.
        """
        parts = self.parts(x, state, valid=valid, logits=logits, replay=replay)
        total: Tensor | None = None
        for output, packed, weight in parts.members:
            total = combine(output, packed, weight=weight, skip=total)
        assert total is not None
        return Activated(total, parts.state, parts.routing, parts.losses)

    def parts(
        self,
        x: Tensor,
        state: ActivatedState | None = None,
        *,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        logits: Tensor | None = None,
        router: Weights | None = None,
        replay: Routing | None = None,
    ) -> Parts:
        """The same up to the modules' outputs, for a block that does the rest by :func:`~sma.ops.combine.combine`.

        Args:
            x: as for :meth:`forward`, like the others that are not listed here.
            state: see there.
            valid: see there.
            lengths: ``(B,)`` int64 real tokens of each row, instead of ``valid`` where all padding is on the right.
            logits: see :meth:`forward`.
            router: weight ``(M * logits_per_module, D)`` and bias, instead of the layer's own router.
            replay: see :meth:`forward`.
        """
        self._check(x, valid, lengths, state)
        self._know_width(x.shape[-1])
        seen = None if state is None else state.seen
        weights = router if router is not None or logits is not None else self._weights(x)
        scored = score_tokens(type(self).__name__, self.configurator, x, weights, logits, valid, lengths, seen)
        capacity = self.capacity if replay is None and (state is None or self.capacity_streams) else None
        routing, scored = route_tokens(self.configurator, scored, replay=replay, capacity=capacity)
        losses = {} if self.rate_loss is None else {"rate": self.rate_loss(scored.score, routing.active, scored.valid)}
        x, confidence = scored.x, weights_of(routing.confidence)
        members: list[Part] = []
        states: list[State | None] = []
        for m, (module, layout) in enumerate(zip(self._members, self.layouts, strict=True)):
            before = state.members[m] if state is not None else None
            if m == 0 and scored.tokens is not None:
                tokens = scored.tokens
            else:
                tokens, x = compress_through(x, routing.packed[m])
            if layout == "padded" and self.window is not None:
                result = call_windowed(module, tokens, routing.packed[m], before, self.window)
            else:
                result = call_module(module, layout, tokens, routing.packed[m], before, self.causal)
            members.append(Part(result.output, routing.packed[m], confidence[m]))
            states.append(result.state)
            prefix = f"{m}." if len(self._members) > 1 else ""
            losses.update({prefix + name: loss for name, loss in result.losses.items()})
        taken = scored.valid.sum(1) if scored.padded else x.shape[1]
        after = None if state is None else ActivatedState(state.seen + taken, tuple(states))
        return Parts(tuple(members), x, after, routing, losses)

    def _check(self, x: Tensor, valid: Tensor | None, lengths: Tensor | None, state: ActivatedState | None) -> None:
        name = type(self).__name__
        if x.dim() != 3 or not x.is_floating_point():
            raise ShapeError(f"{name}: x must be floating point with shape (B, L, D), got {x.dtype} {tuple(x.shape)}")
        if self.d_model is not None and x.shape[-1] != self.d_model:
            raise ShapeError(f"{name}: x must have d_model = {self.d_model} features, got {tuple(x.shape)}")
        self._check_weights(x)
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

    def _check_weights(self, x: Tensor) -> None:
        """The router stands for all weights; modules may mix dtypes, and may run in several."""
        name, weight = type(self).__name__, self.router.weight if self.router is not None else None
        if weight is None or isinstance(self.router, _LazyRouter):
            return
        if x.device != weight.device:
            raise ShapeError(f"{name}: x must be on the device of the layer, {weight.device}, got {x.device}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ShapeError(f"{name}: x must be {weight.dtype} like the layer, got {x.dtype}")

    def _weights(self, x: Tensor) -> Weights | None:
        """Those of the layer's own router, if it has one."""
        if self.router is None:
            return None
        if isinstance(self.router, _LazyRouter):
            self.router(x[:0])
        return self.router.weight, self.router.bias

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, layouts={self.layouts}, causal={self.causal}"


class SparselyActivated(SparseMixture):
    """One module that runs only on the tokens that activate it. Wrap any module; nothing else is needed.

    Args:
        module: the module.
        configurator: who decides; by default the paper's tempered softmax.
        layout: where it should not be inferred: ``tokens``, ``packed`` or ``padded``.
        **options: as for :class:`SparseMixture`.

    Example:
        >>> ffn = SparselyActivated(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)))
        >>> x = torch.randn(2, 10, 16)
        >>> y = x + ffn(x).output
    """

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

    @property
    def _members(self) -> list[nn.Module]:
        return [self.module]


@dataclass(kw_only=True, frozen=True)
class ActivatedConfig(BaseConfig):
    """A sparsely activated module in a spec.

    Attributes:
        module: what to activate.
        configurator: who decides.
        rate_loss: optional loss towards a target rate.
        controller: optional controller of the rate, applied by the training loop.
        capacity: share of the tokens that there is room for, see :meth:`SparseMixture.with_capacity`; None for as many
            as are active.
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
