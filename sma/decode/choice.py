"""The one place that chooses how a part decodes: by its own stepper, or by the fallback that calls it."""

from __future__ import annotations

from torch import nn

from sma.decode.fallback import FallbackBlock, FallbackMixer, FallbackModule, TokenModule
from sma.interfaces import Block, Layout, Mixer, Module
from sma.steppers import BlockStepper, MixerStepper, ModuleStepper, SlotSpec


def mixer_stepper(mixer: nn.Module, spec: SlotSpec) -> MixerStepper:
    """How a mixer decodes.

    Raises:
        StreamingError: it cannot stream.
    """
    own = mixer.stepper(spec) if isinstance(mixer, Mixer) else None
    return FallbackMixer(mixer, spec) if own is None else own


def module_stepper(module: nn.Module, layout: Layout, spec: SlotSpec) -> ModuleStepper:
    """How an activatable module of layout "tokens" or "packed" decodes."""
    own = module.stepper(spec) if isinstance(module, Module) else None
    if own is not None:
        return own
    return TokenModule(module) if layout == "tokens" else FallbackModule(module, spec)


def block_stepper(block: nn.Module, spec: SlotSpec) -> BlockStepper:
    """How a block decodes.

    Raises:
        StreamingError: a part of it cannot stream.
    """
    own = block.stepper(spec) if isinstance(block, Block) else None
    return FallbackBlock(block, spec) if own is None else own


def stepper_of(part: Mixer | Module | Block, spec: SlotSpec) -> MixerStepper | ModuleStepper | BlockStepper:
    """How a part of any kind decodes.

    Raises:
        StreamingError: it cannot stream.
    """
    if isinstance(part, Mixer):
        return mixer_stepper(part, spec)
    return module_stepper(part, part.layout, spec) if isinstance(part, Module) else block_stepper(part, spec)
