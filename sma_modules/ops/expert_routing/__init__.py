"""expert_routing: from a router's logits to the experts of each token, their weights, and the means for the losses."""

from sma_modules.ops.expert_routing.op import OP, choose_experts
from sma_modules.ops.expert_routing.types import ChosenExperts

__all__ = ["OP", "ChosenExperts", "choose_experts"]
