"""Laws 2 and 8: one meaning whatever runs it, the same bits twice, right gradients, low precision."""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sma.ops import operations, using
from sma.routing import Routing
from sma.testing.base import Result, SequenceSuite, gradients, law


def backends() -> list[str]:
    """Every backend that some loaded operation has and that can run on any machine."""
    from importlib.util import find_spec

    anywhere = {"eager", "reference"} | ({"torch_scatter"} if find_spec("torch_scatter") else set())
    return sorted(anywhere & {name for op in operations().values() for name in op.backends})


class _Called(nn.Module):
    """A component together with how its suite calls it, so that ``functional_call`` can put in other parameters."""

    def __init__(self, suite: SequenceSuite, module: nn.Module) -> None:
        super().__init__()
        self.suite = suite
        self.module = module

    def forward(self, x: Tensor, replay: Mapping[str, Routing] | None) -> Result:
        return self.suite.call(self.module, x, replay=replay)


class NumericLaws(SequenceSuite):
    """The same numbers from every backend, every time; gradients that finite differences confirm."""

    @law("one meaning")
    def test_backends_agree(self) -> None:
        module = self.module()
        x, valid = self.pad(self.rows([6, 0, 3]), self.sides[-1])
        results = {}
        for name in [None, *backends()]:
            if name is None:
                result = self.call(module, x, valid=valid)
            else:
                with using(name):
                    result = self.call(module, x, valid=valid)
            y = result.y[valid] if self.per_token else result.y
            results[name] = (y, gradients(y.square().sum(), module))
        usual, usual_grads = results.pop(None)
        for name, (y, grads) in results.items():
            self.assert_close(y, usual, f"backend {name}")
            for parameter, grad in usual_grads.items():
                other = grads[parameter]
                if grad is not None:
                    assert other is not None
                    self.assert_close(other, grad, f"backend {name}: gradient of {parameter}")

    @law("one meaning")
    def test_inference_mode(self) -> None:
        # Also with padding: stock modules take other kernels for it once no gradient is wanted.
        module = self.module()
        x, valid = self.pad(self.rows([9, 4]), self.sides[-1])
        with torch.inference_mode():
            inferred = self.call(module, x, valid=valid).y.clone()
        expected = self.call(module, x, valid=valid).y
        if self.per_token:
            inferred, expected = inferred[valid], expected[valid]
        self.assert_close(inferred, expected, "in inference mode")

    @law("determinism")
    def test_same_bits_twice(self) -> None:
        module = self.module().train()
        x, valid = self.pad(self.rows([6, 2, 5]), self.sides[-1])
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            result = self.call(module, x, valid=valid)
            runs.append((result.y, gradients(result.total(), module)))
        (y, grads), (again, grads_again) = runs
        assert torch.equal(y, again)
        for name, grad in grads.items():
            other = grads_again[name]
            assert (grad is None) == (other is None)
            assert grad is None or other is None or torch.equal(grad, other), f"gradient of {name}"

    @law("determinism")
    def test_state_dict(self) -> None:
        module, other, x = self.module(0), self.module(1), self.inputs(2, 5)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert torch.equal(self.call(other, x).y, self.call(module, x).y)

    @law("gradients")
    def test_gradcheck(self) -> None:
        module, x = self.module(), self.inputs(2, 5)
        record = {name: routing.detach() for name, routing in self.call(module, x).routings.items()}
        called = _Called(self, module)
        names = [name for name, _ in called.named_parameters()]
        values = tuple(parameter.detach().clone().requires_grad_() for parameter in called.parameters())

        def run(x: Tensor, *parameters: Tensor) -> Tensor:
            result = functional_call(called, dict(zip(names, parameters, strict=True)), (x, record or None))
            assert isinstance(result, Result)
            return result.y

        x.requires_grad_(self.real_input)
        assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True, atol=1e-5, rtol=1e-3)

    @law("low precision")
    def test_bfloat16(self) -> None:
        module, x = self.module().to(torch.bfloat16).train(), self.inputs(2, 6)
        result = self.call(module, x.to(torch.bfloat16) if self.real_input else x)
        assert result.y.dtype == torch.bfloat16
        assert result.y.isfinite().all()
        for name, grad in gradients(result.y.float().sum(), module).items():
            assert grad is None or (grad.dtype == torch.bfloat16 and grad.isfinite().all()), f"gradient of {name}"

    @law("low precision")
    def test_autocast(self) -> None:
        module, x = self.module().float().train(), self.inputs(2, 6)
        with torch.autocast("cpu", torch.bfloat16):
            result = self.call(module, x.float() if self.real_input else x)
        assert result.y.isfinite().all()
        for name, grad in gradients(result.y.float().sum(), module).items():
            assert grad is None or (grad.dtype == torch.float32 and grad.isfinite().all()), f"gradient of {name}"
