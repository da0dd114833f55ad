"""The stepper of a sparsely activated layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.activated import ActivatedState
from sma.decision import Weights, gate_of
from sma.errors import StreamingError
from sma.layer import SparseMixture
from sma.ops.backend import concrete
from sma.ops.narrow_linear import narrow_linear
from sma.ops.router import router
from sma.routing import Packed
from sma.runtime.plain import call_router, is_plain
from sma.steppers import ActivatedStepper, Decision, ModuleStepper, SlotSpec, StepContext, Stepper


class MixtureStepper(ActivatedStepper):
    """Decides for every slot, and runs the modules for those that are active.

    Nothing is compressed: the number of slots is small, and each module keeps the cost of inactive rows small.
    """

    def __init__(self, layer: SparseMixture, members: tuple[ModuleStepper, ...], spec: SlotSpec) -> None:
        self.configurator = layer.configurator
        self.router = layer.router
        self.members = members
        self._order = torch.arange(spec.slots, device=spec.like.device)
        self._bounds = torch.arange(spec.slots + 1, device=spec.like.device)
        self._overflow = torch.zeros((), dtype=torch.int64, device=spec.like.device)

    def parts(self) -> dict[str, Stepper]:
        if len(self.members) == 1:
            return {"module": self.members[0]}
        return {f"members.{m}": member for m, member in enumerate(self.members)}

    def decide(
        self, x: Tensor, context: StepContext, weights: Weights | None = None, logits: Tensor | None = None
    ) -> Decision:
        """The decision for ``x (S, D)``.

        Args:
            x: a token of every slot.
            context: the position of the slots.
            weights: of a router, instead of the layer's own.
            logits: ``(S, M * logits_per_module)``, instead of any router.
        """
        configurator, own = self.configurator, self.router
        if weights is None and logits is None and own is not None:
            if is_plain(own):
                weights = own.weight, own.bias
            else:
                logits = call_router(own, x[:, None])
        gate = None if weights is None else gate_of(configurator)
        if gate is not None and weights is not None:
            routed = router(x[:, None], *weights, gate, valid=context.live[:, None])
            confidence = configurator.weigh(routed.score, routed.active)
            return Decision(routed.active[:, 0], confidence[:, 0])
        shape = (x.shape[0], 1, configurator.n_modules, configurator.logits_per_module)
        if weights is not None:
            logits = narrow_linear(x[:, None], *weights)[0]
        logits = x.new_empty(shape) if logits is None else logits.reshape(shape)
        position = context.position[:, None]
        score = configurator(logits, position)
        active = configurator.decide(score, position, context.live[:, None])[:, 0] & context.live[:, None]
        return Decision(active, configurator.weigh(score, active[:, None])[:, 0])

    def outputs(self, x: Tensor, decision: Decision, context: StepContext) -> list[Tensor | None]:
        """``(S, D)`` of every module; None for one that is known to be active in no slot."""
        outputs: list[Tensor | None] = []
        for m, member in enumerate(self.members):
            active = decision.active[:, m]
            if member.d_out is not None and concrete(active) and not bool(active.any()):
                member.idle(context)
                outputs.append(None)
            else:
                outputs.append(member.step(x, active, context))
        return outputs

    def step(self, x: Tensor, context: StepContext, logits: Tensor | None = None) -> tuple[Tensor, Decision]:
        decision = self.decide(x, context, logits=logits)
        total: Tensor | None = None
        for m, output in enumerate(self.outputs(x, decision, context)):
            if output is None:
                continue
            weighted = output * decision.confidence[:, m, None].to(output.dtype)
            weighted = weighted.masked_fill(~decision.active[:, m, None], 0)
            total = weighted if total is None else total + weighted
        if total is None:  # no module is active in any slot
            total = x.new_zeros(x.shape[0], self.members[0].d_out or x.shape[1])
        return total, decision

    def packed(self, active: Tensor) -> Packed:
        """Rows ``(S,)`` of which those of ``active (S,)`` count, for :func:`~sma.ops.combine.combine`."""
        slots = active.shape[0]
        index = torch.where(active, self._order, slots)
        row = torch.where(active, self._order, -1).to(torch.int32)
        return Packed(index, self._bounds, self._order, 1, (slots, 1), row, self._overflow)

    def read(self, slots: Tensor, position: Tensor) -> ActivatedState:
        return ActivatedState(position.clone(), tuple(member.read(slots, position) for member in self.members))

    def write(self, slots: Tensor, state: Any, position: Tensor) -> None:
        if len(state.members) != len(self.members):
            raise StreamingError(f"state: must hold {len(self.members)} modules, got {len(state.members)}")
        for member, own in zip(self.members, state.members, strict=True):
            member.write(slots, own, position)
