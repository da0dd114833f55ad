"""The stepper of a sparsely activated layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.decision import Weights, gate_of
from sma.errors import StreamingError
from sma.layer import ActivatedState, SparseMixture
from sma.ops import narrow_linear, router
from sma.ops.backend import concrete
from sma.routing import Packed
from sma.stepping import Decision, ModuleStepper, Moment, Room, Stepper


class MixtureStepper(Stepper):
    """Decides for every slot, and runs the modules for those that are active.

    Nothing is compressed: the number of slots is small, and each module sees to it that rows that are not active cost
    nothing that matters.
    """

    def __init__(self, layer: SparseMixture, members: tuple[ModuleStepper, ...], room: Room) -> None:
        self.layer = layer
        self.members = members
        self._order = torch.arange(room.slots, device=room.like.device)
        self._bounds = torch.arange(room.slots + 1, device=room.like.device)
        self._overflow = torch.zeros((), dtype=torch.int64, device=room.like.device)

    def parts(self) -> dict[str, Stepper]:
        if len(self.members) == 1:
            return {"module": self.members[0]}
        return {f"members.{m}": member for m, member in enumerate(self.members)}

    def decide(self, x: Tensor, moment: Moment, weights: Weights | None = None) -> Decision:
        """Who is active for ``x (S, D)``; ``weights`` of a router instead of those of the layer itself."""
        configurator, own = self.layer.configurator, self.layer.router
        if weights is None and own is not None:
            weights = own.weight, own.bias
        gate = None if weights is None else gate_of(configurator)
        if gate is not None and weights is not None:
            routed = router(x[:, None], *weights, gate, valid=moment.live[:, None])
            confidence = configurator.weigh(routed.score, routed.active)
            return Decision(routed.active[:, 0], confidence[:, 0])
        shape = (x.shape[0], 1, configurator.n_modules, configurator.logits_per_module)
        logits = x.new_empty(shape) if weights is None else narrow_linear(x[:, None], *weights)[0].reshape(shape)
        position = moment.position[:, None]
        score = configurator.score(logits, position)
        active = configurator.decide(score, position, moment.live[:, None])[:, 0] & moment.live[:, None]
        return Decision(active, configurator.weigh(score, active[:, None])[:, 0])

    def outputs(self, x: Tensor, decision: Decision, moment: Moment) -> list[Tensor | None]:
        """``(S, D)`` of every module; None for one that was seen to have nothing to do."""
        outputs: list[Tensor | None] = []
        for m, member in enumerate(self.members):
            active = decision.active[:, m]
            if member.d_out is not None and concrete(active) and not bool(active.any()):
                member.idle(moment)
                outputs.append(None)
            else:
                outputs.append(member.step(x, active, moment))
        return outputs

    def step(self, x: Tensor, moment: Moment) -> tuple[Tensor, Decision]:
        """``sum_m confidence * f_m(x)`` over the active modules ``(S, D)``, and who was active."""
        decision = self.decide(x, moment)
        total: Tensor | None = None
        for m, output in enumerate(self.outputs(x, decision, moment)):
            if output is None:
                continue
            weighted = output * decision.confidence[:, m, None].to(output.dtype)
            weighted = weighted.masked_fill(~decision.active[:, m, None], 0)
            total = weighted if total is None else total + weighted
        if total is None:  # nobody had anything to do
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
