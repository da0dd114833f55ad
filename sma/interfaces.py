"""The kinds of plugin. The base of a class decides its kind.

All of them are :class:`~sma.configurable.Configurable`, and those of this file are ``nn.Module``. What the surroundings
decide (the width ``d_model``, whether the model is ``causal``) comes as an argument of ``build``; everything else is in
the nested ``Config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sma.configurable import BaseConfig, Configurable
from sma.errors import ConfigError, StreamingError
from sma.ops.router import Gate
from sma.ops.row_norm import RowNorm
from sma.routing import Routing
from sma.runtime.plain import DROPOUTS, is_plain
from sma.state import State
from sma.steppers import BlockStepper, MixerStepper, ModuleStepper, SlotSpec

Layout = Literal["tokens", "packed", "padded"]
KINDS: dict[str, type[Configurable]] = {}


class ModuleOutput(NamedTuple):
    """What an activatable module returns if it returns more than a tensor.

    Attributes:
        output: ``(K, D)``, row for row as the input.
        state: streaming state after this chunk, or None.
        losses: auxiliary losses by name, scalars, already weighted.
    """

    output: Tensor
    state: State | None = None
    losses: Mapping[str, Tensor] = {}


class BlockOutput(NamedTuple):
    """What a block returns: ``x (B, L, D)``, its streaming state, its routings and auxiliary losses by name.

    A tuple, as backward hooks and ``fully_shard`` look for tensors in tuples only.
    """

    x: Tensor
    state: State | None = None
    routings: Mapping[str, Routing] = {}
    losses: Mapping[str, Tensor] = {}


class Plugin(Configurable):
    """Base of all kinds. ``kind`` is the name by which specs and ``sma plugins`` speak of them."""

    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            KINDS[cls.kind] = cls


class Part(Plugin, nn.Module):
    """Base of the kinds that are parts of a network. A part is run by calling it.

    Attributes:
        instead_of_forward: methods of the kind that do the work of ``forward`` in another way. A class with a new
            ``forward`` that does not define one of them as well has that of the kind.
    """

    instead_of_forward: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls) and "instead_of_forward" not in vars(cls):
            kind = next(base for base in cls.__mro__ if "instead_of_forward" in vars(base))
            for name in cls.instead_of_forward:
                if name not in vars(cls):
                    setattr(cls, name, vars(kind)[name])


class Configurator(Part):
    """Latent configurator: turns logits into a decision and a confidence, per token and module (paper, section 3).

    The three steps are separate so that a decision can be recorded and replayed: ``score`` is differentiable,
    ``decide`` is not, ``weigh`` turns scores into the confidence of a given decision, recorded or not. Calling a
    configurator runs ``score``.

    Attributes:
        logits_per_module: how many numbers per token and module the router has to supply; 0 when none is needed.
        causal: True when the decision at t depends on positions up to t only. An instance may set it.
        adjustable: False when the rate is fixed, so that neither a loss nor a controller can move it.
        everywhere: True when every real token is active, so that the decision need not be looked at.
        balance: ``(M,)`` buffer added to the logits in favour of activation; moved by a rate controller, never by a
            gradient.
    """

    kind: ClassVar[str] = "configurator"
    logits_per_module: int = 1
    causal: bool = True
    adjustable: bool = True
    everywhere: bool = False
    balance: Tensor

    @dataclass(kw_only=True, frozen=True)
    class Config(BaseConfig):
        pass

    def __init__(self, config: Config, *, n_modules: int = 1) -> None:
        super().__init__()
        self.config = config
        self.n_modules = n_modules
        self.register_buffer("balance", torch.zeros(n_modules))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "gate" not in own and any(step in own for step in ("score", "decide", "weigh")):
            cls.gate = Configurator.gate  # type: ignore[method-assign]  # the gate of a base has the base's steps
        if "everywhere" not in own and "decide" in own:
            cls.everywhere = False

    def reset(self, d_model: int) -> None:
        """Initialise what depends on the width of the tokens; called once the width is known."""

    def forward(self, logits: Tensor, position: Tensor) -> Tensor:
        """:meth:`score`."""
        return self.score(logits, position)

    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        """Differentiable scores ``(B, L, M)``, in float32 or wider, from logits ``(B, L, M, logits_per_module)``.

        Args:
            logits: of the router.
            position: ``(B, L)`` 0-based position in the stream.
        """
        raise NotImplementedError

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        """The decision, bool ``(B, L, M)``, from scores ``(B, L, M)``; the caller masks padding afterwards."""
        raise NotImplementedError

    def weigh(self, score: Tensor, active: Tensor) -> Tensor:
        """Confidence ``(B, L, M)`` of the decision ``active (B, L, M)``. By default the score itself."""
        return score

    def gate(self) -> Gate | None:
        """What the three steps amount to, so that they can be fused with the router; None when they do more.

        A layer takes it in place of ``score`` and ``decide`` where it can, and the confidence is the score then. It is
        not asked when a subclass, or an instance, has one of the three steps anew.
        """
        return None


class Module(Part):
    """A module that can be sparsely activated.

    ``layout`` says what ``forward`` takes: ``tokens`` (K, D), for anything that works token by token; ``packed`` (K, D)
    with a :class:`~sma.ops.packed.Packed` and an optional state, for sequence modules. Both return a tensor, ``(tensor,
    state)`` or a :class:`ModuleOutput`. (``padded`` is for stock modules that know neither.)
    """

    kind: ClassVar[str] = "module"
    instead_of_forward = ("stepper",)
    layout: ClassVar[Layout] = "tokens"
    streams: bool = True
    """False when the module cannot run chunk by chunk, for instance because it looks ahead."""
    counts_rows: ClassVar[bool] = False
    """True when a loss or a statistic is taken over all rows, so that rows without a token would count."""

    @dataclass(kw_only=True, frozen=True)
    class Config(BaseConfig):
        pass

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.causal = causal

    def initial_state(self, batch: int, like: Tensor) -> State | None:
        """State before the first token, on the device and in the dtype of ``like``; None for a module without
        memory.
        """
        return None

    def stepper(self, spec: SlotSpec) -> ModuleStepper | None:
        """What decodes in place with this module's weights; None for the fallback, which calls ``forward``."""
        return None

    def attention_window(self) -> int | None:
        """How many activated tokens to each side are visible; None when the module does not attend or has no bound."""
        return None


class Mixer(Part):
    """An always-on sequence layer: ``forward(x (B, L, D), state=None, *, lengths=None) -> (y (B, L, D), state)``.

    Rows are right-padded and ``lengths (B,)`` counts their real tokens; None means that all are. Padding never changes
    an output or a state. Given a state (first from :meth:`initial_state`), a causal mixer returns the one after the
    last real token of each row; without one the rows are whole sequences and it returns None.
    """

    kind: ClassVar[str] = "mixer"
    instead_of_forward = ("stepper", "activated")
    streams: bool = True

    @dataclass(kw_only=True, frozen=True)
    class Config(BaseConfig):
        pass

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.causal = causal

    def initial_state(self, batch: int, like: Tensor) -> State | None:
        """State before the first token; None for a causal mixer without memory.

        Raises:
            StreamingError: the mixer cannot run chunk by chunk.
        """
        if not (self.causal and self.streams):
            reason = "has no bounded memory" if self.causal else "looks ahead"
            raise StreamingError(f"{type(self).__name__}: cannot stream: it {reason}")
        return None

    def stepper(self, spec: SlotSpec) -> MixerStepper | None:
        """What decodes in place with this mixer's weights; None for the fallback, which calls ``forward``.

        Raises:
            StreamingError: the mixer cannot stream.
        """
        return None

    def activated(
        self, x: Tensor, state: Any = None, *, lengths: Tensor | None = None, dropout: float = 0.0
    ) -> tuple[Tensor, Any]:
        """``dropout(SiLU(mixer(x)))`` and the state after it. A mixer that can do it in one pass overrides this.

        It is used where the mixer is plain, see :func:`activated_by`.

        Args:
            x: as for ``forward``, like ``state`` and ``lengths``.
            state: streaming state.
            lengths: real tokens of each row.
            dropout: probability; 0 in evaluation.
        """
        y, after = self(x, state, lengths=lengths)
        return F.dropout(F.silu(y), dropout, dropout > 0), after


def activated_by(
    mixer: nn.Module, x: Tensor, state: Any, lengths: Tensor | None, dropout: nn.Dropout
) -> tuple[Tensor, Any]:
    """``dropout(SiLU(mixer(x)))`` and the state after it: fused where both parts are plain, else by calling them.

    Args:
        mixer: a :class:`Mixer`, or what was put in its place or around it.
        x: as the mixer takes it, like ``state`` and ``lengths``.
        state: streaming state.
        lengths: real tokens of each row.
        dropout: behind the activation.
    """
    if isinstance(mixer, Mixer) and is_plain(mixer, Mixer) and is_plain(dropout, DROPOUTS):
        return mixer.activated(x, state, lengths=lengths, dropout=dropout.p if dropout.training else 0.0)
    y, after = mixer(x, state, lengths=lengths)
    return dropout(F.silu(y)), after


class Norm(Part):
    """Normalisation over the features: ``forward(x (B, L, D), *, lengths=None) -> (B, L, D)``."""

    kind: ClassVar[str] = "norm"
    instead_of_forward = ("row_norm",)

    @dataclass(kw_only=True, frozen=True)
    class Config(BaseConfig):
        pass

    def __init__(self, config: Config, *, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model

    def row_norm(self) -> RowNorm | None:
        """What the norm does to each token, so that it can be fused into what comes before; None when it does more."""
        return None


class Block(Part):
    """One layer of depth: ``forward(x, state=None, *, lengths=None, replay=None) -> BlockOutput``.

    ``replay`` maps names of routings (as in ``BlockOutput.routings``) to routings whose decision is taken over.
    """

    kind: ClassVar[str] = "block"
    instead_of_forward = ("stepper",)

    @dataclass(kw_only=True, frozen=True)
    class Config(BaseConfig):
        pass

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.causal = causal

    def initial_state(self, batch: int, like: Tensor) -> State | None:
        """State before the first token."""
        return None

    def stepper(self, spec: SlotSpec) -> BlockStepper | None:
        """What decodes in place with this block's weights; None for the fallback, which calls ``forward``.

        Raises:
            StreamingError: a part of the block cannot stream.
        """
        return None


class Model(Part):
    """A whole model, with its embedding and head; the root of a spec."""

    kind: ClassVar[str] = "model"

    @dataclass(kw_only=True, frozen=True)
    class Config(BaseConfig):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def initial_state(self, batch: int) -> State | None:
        """State before the first token of ``batch`` sequences.

        Raises:
            StreamingError: the model reads whole sequences; or one of its parts cannot stream.
        """
        raise StreamingError(f"{type(self).__name__}: reads whole sequences, it does not stream")


def kind_of(cls: type[Any]) -> str:
    """The kind of plugin that a class is.

    Raises:
        ConfigError: the class derives from none of the kinds.
    """
    kind = getattr(cls, "kind", "") if isinstance(cls, type) and issubclass(cls, Plugin) else ""
    if not kind:
        raise ConfigError(f"{cls!r}: a plugin class derives from one of {', '.join(sorted(KINDS))} of sma.interfaces")
    return kind
