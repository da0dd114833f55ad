"""The one place that chooses how a part decodes: by its own stepper, or by the fallback that calls it.

A stepper works with the weights of its part and does not call it. So it is taken only for a part that is
:func:`plain <sma.runtime.plain.is_plain>`. A stepper may use children without calling them or choosing steppers for
them. If such a child is not plain, its parent returns no stepper, or calls the child.
"""

from __future__ import annotations

from torch import nn

from sma.decode.fallback import (
    FallbackActivated,
    FallbackBlock,
    FallbackMixer,
    FallbackModule,
    TokenModule,
    WindowedModule,
)
from sma.decode.mixture import MixtureStepper
from sma.errors import StreamingError
from sma.interfaces import Block, Layout, Mixer, Module
from sma.layer import SparseMixture
from sma.runtime.plain import is_plain, why_called
from sma.steppers import ActivatedStepper, BlockStepper, MixerStepper, ModuleStepper, SlotSpec


def mixer_stepper(mixer: nn.Module, spec: SlotSpec) -> MixerStepper:
    """How a mixer decodes.

    Raises:
        StreamingError: it cannot stream.
    """
    own = mixer.stepper(spec) if isinstance(mixer, Mixer) and is_plain(mixer, Mixer) else None
    return FallbackMixer(mixer, spec, why_called(mixer, Mixer)) if own is None else own


def module_stepper(module: nn.Module, layout: Layout, spec: SlotSpec) -> ModuleStepper:
    """How an activatable module of layout "tokens" or "packed" decodes."""
    own = module.stepper(spec) if isinstance(module, Module) and is_plain(module, Module) else None
    if own is not None:
        return own
    return TokenModule(module) if layout == "tokens" else FallbackModule(module, spec, why_called(module, Module))


def activated_stepper(layer: nn.Module, spec: SlotSpec) -> ActivatedStepper:
    """How a sparsely activated layer decodes.

    Raises:
        StreamingError: it cannot stream; the message says why.
    """
    if not (isinstance(layer, SparseMixture) and is_plain(layer, SparseMixture)):
        return FallbackActivated(layer, spec, why_called(layer, SparseMixture))
    reason = layer.why_not_streaming()
    if reason is not None:
        raise StreamingError(f"{type(layer).__name__}: cannot stream: {reason}")
    members: list[ModuleStepper] = []
    for m, (module, layout) in enumerate(zip(layer.activated_modules, layer.layouts, strict=True)):
        if layout == "padded" and layer.window is not None:
            initial = layer.initial_state(spec.slots, spec.like).members[m]
            members.append(WindowedModule(module, layer.window, initial, spec))
        else:
            members.append(module_stepper(module, layout, spec))
    return MixtureStepper(layer, tuple(members), spec)


def block_stepper(block: nn.Module, spec: SlotSpec, kind: type[nn.Module] = Block) -> BlockStepper:
    """How a block decodes, or what is called like one and has a ``stepper`` as well (``kind``).

    Raises:
        StreamingError: a part of it cannot stream.
    """
    own: BlockStepper | None = block.stepper(spec) if is_plain(block, kind) else None  # type: ignore[operator]
    return FallbackBlock(block, spec, why_called(block, kind)) if own is None else own


def stepper_of(
    part: Mixer | Module | Block | SparseMixture, spec: SlotSpec
) -> MixerStepper | ModuleStepper | BlockStepper | ActivatedStepper:
    """How a part of any kind decodes.

    Raises:
        StreamingError: it cannot stream.
    """
    if isinstance(part, SparseMixture):
        return activated_stepper(part, spec)
    if isinstance(part, Mixer):
        return mixer_stepper(part, spec)
    return module_stepper(part, part.layout, spec) if isinstance(part, Module) else block_stepper(part, spec)
