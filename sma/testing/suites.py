"""The suites, one for each kind of plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.configurators import Always, TemperedSoftmax
from sma.errors import ShapeError
from sma.interfaces import Block, Configurator, Layout, Mixer, Model, Module, ModuleOutput, Norm
from sma.layer import SparselyActivated, SparseMixture
from sma.routing import Packed, Routing
from sma.state import State
from sma.testing.base import Result, few, law, lengths_of_rows
from sma.testing.called import CalledLaws
from sma.testing.numerics import NumericLaws
from sma.testing.routing import RoutingLaws
from sma.testing.streaming import StreamingLaws
from sma.testing.world import WorldLaws
from sma.wrap.layouts import infer_layout, is_chain


class _LayerSuite(WorldLaws, StreamingLaws, RoutingLaws, NumericLaws, CalledLaws):
    """Laws of one sparsely activated layer."""

    def call(
        self,
        module: nn.Module,
        x: Tensor,
        state: State | None = None,
        *,
        valid: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> Result:
        y, after, routing, losses = module(x, state, valid=valid, replay=replay[""] if replay else None)
        return Result(y, after, {"": routing}, losses)

    def check_silent(self, y: Tensor, valid: Tensor) -> None:
        assert not y.any(), "a layer without active modules gives zeros"

    @law("bad input is refused")
    def test_bad_input(self) -> None:
        layer = self.module()
        x = self.inputs(2, 3)
        bad = x.clone()
        for value in (float("nan"), float("inf")):
            bad[1, 2, 0] = value
            with pytest.raises(ShapeError, match="finite"):
                layer(bad)
        for wrong in (x[0], x.long(), x[..., :-1]):
            with pytest.raises(ShapeError):
                layer(wrong)
        for valid in (torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool)):
            with pytest.raises(ShapeError, match="valid"):
                layer(x, valid=valid)


class ModuleSuite(_LayerSuite):
    """The laws of an activatable module, inside a sparsely activated layer with the paper's configurator.

    Attributes:
        config: what to build. :meth:`create` can be overridden instead.
        layout: where it should not be inferred.
        window: working memory of a module of layout "padded".

    Example:
        >>> class TestGate(ModuleSuite):                          # doctest: +SKIP
        ...     config = Gate.Config(width=4)
        ...     d_model = 8
    """

    config: ClassVar[Module.Config]
    layout: ClassVar[Layout | None] = None
    window: ClassVar[int | None] = None

    def create(self) -> nn.Module:
        """A new module."""
        module: nn.Module = self.config.build(d_model=self.d_model, causal=self.causal)
        return module

    def configurator(self) -> Configurator:
        """The configurator that decides."""
        return TemperedSoftmax(TemperedSoftmax.Config())

    def build(self) -> nn.Module:
        return self.around(self.create(), self.configurator())

    def around(self, module: nn.Module, configurator: Configurator) -> SparselyActivated:
        """The layer that activates a module."""
        layer = SparselyActivated(module, configurator, d_model=self.d_model, causal=self.causal, layout=self.layout)
        return layer if self.window is None else layer.with_window(self.window)

    def plain(self, module: nn.Module, x: Tensor, position: Tensor) -> Tensor:
        """The module by itself on the tokens ``x (n, D)`` of one sequence, which had ``position (n,)`` in the input."""
        if (self.layout or infer_layout(module)) == "packed":
            packed = Packed.from_mask(torch.ones(1, len(x), dtype=torch.bool), position[None])
            result = module(x, packed, None)
        else:
            result = module(x)
        return result if isinstance(result, Tensor) else ModuleOutput(*result).output

    @law("one meaning")
    @few
    @given(lengths=lengths_of_rows, seed=st.integers(0, 100))
    def test_the_definition(self, lengths: list[int], seed: int) -> None:
        """``extract(c * f(compress(x)))``, sequence by sequence and token by token."""
        layer, (x, valid) = self.module(), self.pad(self.rows(lengths), "scattered")
        torch.manual_seed(seed)
        y, _, routing, _ = layer(x, valid=valid)
        expected = torch.zeros_like(y)
        for b in range(len(lengths)):
            at = routing.active[b, :, 0].nonzero()[:, 0]
            if len(at):
                out = self.plain(layer.module, x[b, at], routing.position[b, at])
                expected[b, at] = out * routing.confidence[b, at]
        self.assert_close(y, expected, "compressed")

    @law("always on = plain module")
    @few
    @given(lengths=lengths_of_rows)
    def test_always_on(self, lengths: list[int]) -> None:
        module = self.module().module
        layer = self.around(module, Always(Always.Config())).eval()
        rows = self.rows(lengths)
        x, valid = self.pad(rows, "left", extra=1)
        y = layer(x, valid=valid).output
        for b, row in enumerate(rows):
            if len(row):
                self.assert_close(y[b, valid[b]], self.plain(module, row, torch.arange(len(row))), f"row {b}")

    @law("always on = plain module")
    def test_gradients_of_always_on(self) -> None:
        module, x = self.module().module, self.inputs(1, 5)
        layer = self.around(module, Always(Always.Config())).eval()
        sparse = torch.autograd.grad(layer(x).output.square().sum(), list(module.parameters()), allow_unused=True)
        plain = self.plain(module, x[0], torch.arange(5)).square().sum()
        dense = torch.autograd.grad(plain, list(module.parameters()), allow_unused=True)
        for (name, _), one, other in zip(module.named_parameters(), sparse, dense, strict=True):
            if other is not None:
                assert one is not None
                self.assert_close(one, other, f"gradient of {name}")


class StockSuite(ModuleSuite):
    """The same laws for a module that knows nothing of this library: supply ``create`` and :meth:`native`.

    Example:
        >>> class TestConvolution(StockSuite):                    # doctest: +SKIP
        ...     def create(self):
        ...         return nn.Conv1d(8, 8, 3, padding=1)
        ...     def native(self, module, x):                      # one whole sequence (1, n, D), as without the library
        ...         return module(x.transpose(1, 2)).transpose(1, 2)
    """

    def parts_that_run(self, module: nn.Module) -> dict[str, nn.Module]:
        """Not the parts of modules of other libraries, which may read each other's weights, nor chains of them."""
        chain = {"module"} if is_chain(module.module) else set()  # type: ignore[arg-type]
        parts = super().parts_that_run(module).items()
        return {name: part for name, part in parts if not name.startswith("module.") and name not in chain}

    def parts_with_gradients(self, module: nn.Module) -> dict[str, nn.Module]:
        """Not recurrent nets, which return packed sequences, where PyTorch looks for no tensor."""
        parts = super().parts_with_gradients(module).items()
        return {name: part for name, part in parts if not isinstance(part, nn.RNNBase)}

    def native(self, module: nn.Module, x: Tensor) -> Tensor:
        """The module on one sequence ``(1, n, D)``, called as its own documentation says."""
        y: Tensor = module(x)
        return y

    def plain(self, module: nn.Module, x: Tensor, position: Tensor) -> Tensor:
        return self.native(module, x[None])[0]


class MixerSuite(WorldLaws, StreamingLaws, RoutingLaws, NumericLaws, CalledLaws):
    """The laws of an always-on sequence layer. Rows are right-padded, as everywhere inside a model.

    Example:
        >>> class TestAverage(MixerSuite):                        # doctest: +SKIP
        ...     config = Average.Config()
        ...     causal = True
        ...     streams = True
    """

    config: ClassVar[Mixer.Config]
    routes = False
    sides = ("right",)

    def build(self) -> nn.Module:
        mixer: nn.Module = self.config.build(d_model=self.d_model, causal=self.causal)
        return mixer

    def call(
        self,
        module: nn.Module,
        x: Tensor,
        state: State | None = None,
        *,
        valid: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> Result:
        y, after = module(x, state, lengths=None if valid is None else valid.sum(1))
        return Result(y, after)


class NormSuite(WorldLaws, RoutingLaws, NumericLaws, CalledLaws):
    """The laws of a normalisation: token by token in evaluation mode, and blind to padding in any mode."""

    config: ClassVar[Norm.Config]
    routes = False
    causal = True
    sides = ("right",)

    def build(self) -> nn.Module:
        norm: nn.Module = self.config.build(d_model=self.d_model)
        return norm

    def call(
        self,
        module: nn.Module,
        x: Tensor,
        state: State | None = None,
        *,
        valid: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> Result:
        return Result(module(x, lengths=None if valid is None else valid.sum(1)))

    @law("batch independence")
    def test_padding_is_not_counted_in_training(self) -> None:
        rows = self.rows([6, 4, 5])
        results = []
        for extra in (0, 3):
            module = self.module().train()
            x, valid = self.pad(rows, extra=extra)
            y = self.call(module, x, valid=valid).y
            results.append([y[valid], *(buffer for buffer in module.buffers() if buffer.is_floating_point())])
        for i, (one, other) in enumerate(zip(*results, strict=True)):
            self.assert_close(other, one, f"more padding: {'output' if i == 0 else f'statistic {i}'}")


class BlockSuite(WorldLaws, StreamingLaws, RoutingLaws, NumericLaws, CalledLaws):
    """The laws of one block of depth. Rows are right-padded, as everywhere inside a model.

    Example:
        >>> class TestSandwich(BlockSuite):                       # doctest: +SKIP
        ...     config = Sandwich.Config(inner=Gate.Config())
    """

    config: ClassVar[Block.Config]
    sides = ("right",)

    def build(self) -> nn.Module:
        block: nn.Module = self.config.build(d_model=self.d_model, causal=self.causal)
        return block

    def call(
        self,
        module: nn.Module,
        x: Tensor,
        state: State | None = None,
        *,
        valid: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> Result:
        out = module(x, state, lengths=None if valid is None else valid.sum(1), replay=replay)
        return Result(out.x, out.state, out.routings, out.losses)


class ModelSuite(WorldLaws, StreamingLaws, RoutingLaws, NumericLaws, CalledLaws):
    """The laws of a whole model that reads token numbers ``(B, L)``; with ``vocab_size = None`` real numbers.

    Attributes:
        vocab_size: number of tokens.
        per_token: False when the model gives one answer for each sequence, as a classifier does.

    Example:
        >>> class TestTiny(ModelSuite):                           # doctest: +SKIP
        ...     config = Tiny.Config(vocab_size=11)
        ...     causal = True
        ...     streams = True
    """

    config: ClassVar[Model.Config]
    vocab_size: ClassVar[int | None] = 11
    real_input = False
    in_place = False

    def build(self) -> nn.Module:
        model: nn.Module = self.config.build()
        return model

    def start(self, module: nn.Module, batch: int, like: Tensor) -> State | None:
        state: State | None = module.initial_state(batch)  # type: ignore[operator]
        return state

    def inputs(self, *shape: int) -> Tensor:
        if self.vocab_size is None:
            return torch.randn(*shape, dtype=torch.float64)
        return torch.randint(self.vocab_size, shape)

    def garbage(self, x: Tensor) -> Tensor:
        return x * 1000 if self.vocab_size is None else torch.randint_like(x, self.vocab_size)

    def call(
        self,
        module: nn.Module,
        x: Tensor,
        state: State | None = None,
        *,
        valid: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> Result:
        options: dict[str, Any] = {} if state is None else {"state": state}
        out = module(x, valid=valid, replay=replay, **options)
        return Result(out.logits, out.state, out.routings, out.losses)


__all__ = ["BlockSuite", "MixerSuite", "ModelSuite", "ModuleSuite", "NormSuite", "SparseMixture", "StockSuite"]
