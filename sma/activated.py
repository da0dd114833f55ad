"""What a sparsely activated layer returns, and what it remembers of a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sma.routing import Routing
from sma.state import State


class Activated(NamedTuple):
    """What a sparsely activated layer returns.

    Attributes:
        output: ``(B, L, D)``, zero where nothing is active. Add it to whatever the block adds.
        state: streaming state after this chunk; None unless one was passed in.
        routing: which tokens were active, and with which confidence.
        losses: auxiliary losses by name, scalars, already weighted.
    """

    output: Tensor
    state: ActivatedState | None
    routing: Routing
    losses: dict[str, Tensor]


@dataclass(frozen=True)
class ActivatedState(State):
    """Streaming state of a sparsely activated layer.

    Attributes:
        seen: ``(B,)`` int64: real tokens so far, active or not.
        members: the state of each module, None for a module without memory.
    """

    seen: Tensor
    members: tuple[State | None, ...]
