"""Law 9: parts are called, so hooks and other attachments of a part work, with the results of the fused paths."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sma.decode.choice import stepper_of
from sma.interfaces import Configurator
from sma.steppers import SlotSpec, StepContext
from sma.testing.base import SequenceSuite, gradients, law


class CalledLaws(SequenceSuite):
    """Hooks of every kind run on every part, alone and together, in ``forward`` and in steps, and change nothing."""

    def parts_that_run(self, module: nn.Module) -> dict[str, nn.Module]:
        """The parts that have to be called, by name; containers are not."""
        return {name: part for name, part in module.named_modules() if type(part).forward is not nn.Module.forward}

    def parts_with_gradients(self, module: nn.Module) -> dict[str, nn.Module]:
        """Those of them that a gradient goes through; none does through a score that is a constant."""
        return {
            name: part
            for name, part in self.parts_that_run(module).items()
            if not isinstance(part, Configurator) or part.logits_per_module
        }

    @law("parts are called")
    def test_forward_hooks(self) -> None:
        module = self.module()
        x, valid = self.pad(self.rows([6, 0]), self.sides[-1])
        expected = self.call(module, x, valid=valid)
        wanted = gradients(expected.total(), module)
        parts = self.parts_that_run(module)
        for name, one in {"": parts, **{name: {name: part} for name, part in parts.items()}}.items():
            with hooked(one) as fired:
                result = self.call(module, x, valid=valid)
            for kind in ("pre", "forward"):
                missing = [each for each in one if (kind, each) not in fired]
                assert not missing, f"{kind} hooks did not run on {missing}"
            what = f"with hooks on {name or 'every part'}"
            y, same = (result.y[valid], expected.y[valid]) if self.per_token else (result.y, expected.y)
            self.assert_close(y, same, what)
            for parameter, grad in gradients(result.total(), module).items() if self.per_token and not name else ():
                other = wanted[parameter]
                assert (grad is None) == (other is None), f"gradient of {parameter} {what}"
                if grad is not None and other is not None:
                    self.assert_close(grad, other, f"gradient of {parameter} {what}")

    @law("parts are called")
    def test_backward_hooks(self) -> None:
        module = self.module()
        x, valid = self.pad(self.rows([6, 3]), self.sides[-1])
        inputs = (x.requires_grad_(),) if self.real_input else ()
        wanted = gradients(self.call(module, x, valid=valid).total(), module, *inputs)
        parts = self.parts_with_gradients(module)
        with hooked(parts, backward=True) as fired:
            found = gradients(self.call(module, x, valid=valid).total(), module, *inputs)
        for kind in ("backward pre", "backward"):
            missing = [each for each in parts if (kind, each) not in fired]
            assert not missing, f"{kind} hooks did not run on {missing}"
        for parameter, grad in found.items():
            other = wanted[parameter]
            if grad is not None and other is not None:
                self.assert_close(grad, other, f"gradient of {parameter} with backward hooks")

    @law("parts are called", when="decodes")
    def test_hooks_in_steps(self) -> None:
        """Also on what the stepper of a plain part leaves out."""
        module, length = self.module(), 4
        rows = torch.stack(self.rows([length] * 2))
        whole = self.call(module, rows).y
        parts = self.parts_that_run(module)
        slots = torch.arange(2)
        for name, one in {"": parts, **{name: {name: part} for name, part in parts.items()}}.items():
            with hooked(one) as fired, torch.no_grad():
                stepper: Any = stepper_of(module, SlotSpec(2, 0, rows))
                stepper.write(slots, self.start(module, 2, rows), torch.zeros(2, dtype=torch.int64))
                for t in range(length):
                    context = StepContext(torch.ones(2, dtype=torch.bool), torch.full((2,), t))
                    out = stepper.step(rows[:, t], context)
                    y = out if isinstance(out, Tensor) else out[0]
                    self.assert_close(y, whole[:, t], f"step {t} with hooks on {name or 'every part'}")
            missing = [each for each in one if ("forward", each) not in fired]
            assert not missing, f"hooks did not run in steps on {missing}"


@contextmanager
def hooked(parts: dict[str, nn.Module], *, backward: bool = False) -> Iterator[set[tuple[str, str]]]:
    """Hooks on parts that change nothing; what ran, by kind and name of the part."""
    fired: set[tuple[str, str]] = set()
    handles = []

    def ran(kind: str, name: str) -> Any:
        return lambda *_: fired.add((kind, name))

    for name, part in parts.items():
        if backward:
            handles.append(part.register_full_backward_pre_hook(ran("backward pre", name)))
            handles.append(part.register_full_backward_hook(ran("backward", name)))
        else:
            handles.append(part.register_forward_pre_hook(ran("pre", name)))
            handles.append(part.register_forward_hook(ran("forward", name)))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed")
            yield fired
    finally:
        for handle in handles:
            handle.remove()
