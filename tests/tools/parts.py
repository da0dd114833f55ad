"""The table of parts: whatever is registered, in the configurations of the laws, and every shipped spec made small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sma.decode.choice import stepper_of
from sma.state import State
from sma.steppers import SlotSpec, StepContext
from sma.testing import Result
from sma_models.inference import Decoder
from sma_models.inference.generation import generate
from sma_models.language_model import LanguageModel
from tests.laws import test_blocks, test_configurators, test_mixers, test_models, test_modules, test_norms
from tests.models.tiny import SPECS, call, inputs_of, tiny

KINDS = {
    "model": test_models,
    "block": test_blocks,
    "mixer": test_mixers,
    "module": test_modules,
    "norm": test_norms,
    "configurator": test_configurators,
}
"""By kind, the laws of it. They fail where a registered plugin has no suite, so nothing registered is left out here."""
BATCH, LENGTH = 2, 9
CHUNKS = (4, 1, 1, 3)


@dataclass(frozen=True)
class Part:
    """One configuration of something registered.

    Attributes:
        kind: of the plugin, or "spec".
        name: of the suite or the spec.
        suite: of the laws; None for a spec.
    """

    kind: str
    name: str
    suite: Any = None

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"

    @property
    def streams(self) -> bool:
        """Whether it runs chunk by chunk."""
        return self.name.endswith("_lm") if self.suite is None else bool(self.suite.streams)

    @property
    def decodes(self) -> bool:
        """Whether it takes a token of every slot at a time."""
        return self.streams and self.kind not in ("norm",)

    def build(self) -> Any:
        """A new one in float64 and evaluation mode, the same every time, in which nothing is zero."""
        if self.suite is None:
            module: nn.Module = tiny(self.name).double().eval()
        else:
            module = self.suite().module()
        for dropout in of_type(module, nn.Dropout):
            dropout.p = 0.0
        return module

    def inputs(self, module: nn.Module) -> Tensor:
        """``(BATCH, LENGTH)`` tokens, numbers or features, of which every layer activates some."""
        return self.drawn(module, lively_seed(self))

    def drawn(self, module: nn.Module, seed: int) -> Tensor:
        """``(BATCH, LENGTH)`` tokens, numbers or features."""
        if self.suite is None:
            x = inputs_of(module, BATCH, LENGTH, seed=seed)  # type: ignore[arg-type]
            return x.double() if x.is_floating_point() else x
        torch.manual_seed(seed)
        x = self.suite().inputs(BATCH, LENGTH)
        assert isinstance(x, Tensor)
        return x

    def call(self, module: Any, x: Tensor, state: State | None = None, valid: Tensor | None = None) -> Result:
        """Call it in the way of its kind."""
        if self.suite is not None:
            result: Result = self.suite().call(module, x, state, valid=valid)
            return result
        options: dict[str, Any] = {} if state is None else {"state": state}
        out = call(module, x, valid, **options)
        return Result(out.logits, out.state, out.routings, out.losses)

    def start(self, module: nn.Module, batch: int, like: Tensor) -> State | None:
        """The state before the first token."""
        if self.suite is not None:
            state: State | None = self.suite().start(module, batch, like)
            return state
        return module.initial_state(batch)  # type: ignore[no-any-return,operator]


@cache
def lively_seed(part: Part) -> int:
    """The first seed with which every layer of a part activates a module: a part that does not run changes nothing."""
    module = part.build()
    for seed in range(1, 20):
        with torch.no_grad():
            routings = part.call(module, part.drawn(module, seed)).routings.values()
        if all(bool(routing.active[:, :-2].any((0, 1)).all()) for routing in routings):
            return seed
    return 1


def of_type(module: nn.Module, kind: type[Any]) -> Iterator[Any]:
    """The submodules of a class."""
    return (each for each in module.modules() if isinstance(each, kind))


def every_part() -> Iterator[Part]:
    """The table."""
    for kind, laws in KINDS.items():
        for name, suite in vars(laws).items():
            if name.startswith("Test") and hasattr(suite, "component"):
                yield Part(kind, name.removeprefix("Test"), suite)
    yield from (Part("spec", name) for name in SPECS)


PARTS = list(every_part())


# The ways of running a part. Each gives what came out, token by token, as one tensor.


def whole(part: Part, module: nn.Module) -> Tensor:
    """Whole sequences in evaluation mode, one of them padded."""
    x = part.inputs(module)
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[1, -2:] = False
    with torch.no_grad():
        y = part.call(module, x, valid=valid).y
    return torch.cat([y[0], y[1, :-2]]) if y.shape[1:2] == (LENGTH,) else y


def trained(part: Part, module: nn.Module) -> Tensor:
    """Forward and backward in training mode; the gradients stay at the parameters."""
    module.train()
    try:
        x = part.inputs(module)
        if x.is_floating_point():
            x.requires_grad_()
        torch.manual_seed(3)
        result = part.call(module, x)
        total = result.total()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        return result.y.detach()
    finally:
        module.eval()


def streamed(part: Part, module: nn.Module) -> Tensor:
    """Chunk by chunk, each with the state after the one before."""
    x = part.inputs(module)
    state = part.start(module, BATCH, x)
    outputs = []
    with torch.no_grad():
        for chunk in x.split(CHUNKS, 1):
            result = part.call(module, chunk, state)
            state = result.state
            outputs.append(result.y)
    return torch.cat(outputs, 1)


def stepped(part: Part, module: Any, prompt_was_read: Callable[[], None] = lambda: None) -> Tensor:
    """A prompt, then token by token: a ``Decoder`` for a language model, a stepper for anything else."""
    x = part.inputs(module)
    if isinstance(module, LanguageModel):
        decoder = Decoder(module, BATCH, prefill_chunk=4)
        decoder.join_all(x[:, :5])
        prompt_was_read()
        outputs = [decoder.logits.clone()]
        outputs.extend(decoder.step(x[:, t]).clone() for t in range(5, LENGTH))
        return torch.stack(outputs, 1)
    with torch.no_grad():
        stepper: Any = stepper_of(module, SlotSpec(BATCH, 0, x))
        live = torch.ones(BATCH, dtype=torch.bool)
        outputs = []
        for t in range(LENGTH):
            out = stepper.step(x[:, t], StepContext(live, torch.full((BATCH,), t)))
            outputs.append(out if isinstance(out, Tensor) else out[0])
    return torch.stack(outputs, 1)


def generated(part: Part, module: nn.Module) -> Tensor:
    """Tokens of ``generate``, the most likely ones."""
    assert isinstance(module, LanguageModel)
    return generate(module, part.inputs(module)[:, :5], 4, temperature=0, prefill_chunk=4)


Way = Callable[[Part, nn.Module], Tensor]


def ways_of(part: Part, module: nn.Module) -> dict[str, Way]:
    """How a part can be run without a gradient."""
    ways: dict[str, Way] = {"whole": whole}
    if part.streams:
        ways["chunks"] = streamed
        if not isinstance(module, LanguageModel) and part.kind == "model":
            return ways
        ways["steps"] = stepped
    if part.streams and isinstance(module, LanguageModel):
        ways["generate"] = generated
    return ways
