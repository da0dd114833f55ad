"""Choice of a backend: forced, explained, kept for a signature and for nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sma.errors import BackendError
from sma.ops import using
from sma.ops.backend import Op, forget, lazy
from sma.ops.compress import OP as COMPRESS
from sma.routing import Packed


class Facts(NamedTuple):
    """What the operation below chooses by."""

    device: torch.device
    dtype: torch.dtype
    width: int
    empty: bool


def facts(x: Tensor) -> Facts:
    return Facts(x.device, x.dtype, x.shape[-1], x.numel() == 0)


@pytest.fixture
def asked() -> list[Facts]:
    """Signatures that a backend was asked about."""
    return []


@pytest.fixture
def op(asked: list[Facts]) -> Iterator[Op]:
    """Its backend "narrow" takes float32 of at most 4 features on a CPU, and is not worth it without any."""

    def applies(signature: Facts) -> str | None:
        asked.append(signature)
        if signature.device.type != "cpu":
            return f"runs on the CPU, got {signature.device}"
        if signature.dtype != torch.float32:
            return f"takes float32, got {signature.dtype}"
        return f"takes at most 4 features, got {signature.width}" if signature.width > 4 else None

    op = Op("kept", facts)
    op.register(
        "narrow", lambda x: "narrow", priority=10, applies=applies, pays=lambda s: "nothing to do" if s.empty else None
    )
    op.register("eager", lambda x: "eager")
    op.register("reference", lambda x: "reference", priority=90)
    yield op
    forget(op)


def test_backends_that_cannot_run_say_why() -> None:
    op = Op("only_even")
    try:
        op.backend("even", applies=lambda n: None if n % 2 == 0 else f"{n} is odd")(lambda n: n // 2)
        assert op(4) == 2
        with pytest.raises(BackendError, match=r"only_even: no backend applies: .*3 is odd"):
            op(3)
        with using("even"), pytest.raises(BackendError, match="'even' was forced and cannot run: 3 is odd"):
            op(3)
        op.backend("any", priority=90)(lambda n: -n)
        assert (op(3), op(4)) == (-3, 2)
        with using("any"):
            assert op(4) == -4
    finally:
        forget(op)
    with (
        pytest.raises(BackendError, match=r"using\('fast'\): no operation has such a backend; there are .*eager"),
        using("fast"),
    ):
        pass


def test_forced_backends_nest_and_end() -> None:
    x, packed = torch.randn(1, 2, 1), Packed.from_mask(torch.ones(1, 2, dtype=torch.bool))
    assert COMPRESS.choose(x, packed).name == "eager"
    with using("reference"):
        assert COMPRESS.choose(x, packed).name == "reference"
        with using("eager"):
            assert COMPRESS.choose(x, packed).name == "eager"
        assert COMPRESS.choose(x, packed).name == "reference"
    assert COMPRESS.choose(x, packed).name == "eager"


def test_a_choice_is_kept(op: Op, asked: list[Facts]) -> None:
    for _ in range(3):
        assert op(torch.zeros(2, 3)) == op(torch.ones(7, 3)) == "narrow"
        assert op.choose(torch.zeros(1, 3)).name == "narrow"
    assert asked == [facts(torch.zeros(2, 3))]


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "eager"),
        (torch.zeros(2, 5), "eager"),
        (torch.zeros(0, 3), "eager"),
        (torch.zeros(2, 4), "narrow"),
    ],
    ids=["dtype", "width", "emptiness", "another width"],
)
def test_another_signature_is_another_choice(op: Op, x: Tensor, expected: str) -> None:
    for _ in range(2):
        assert op(torch.zeros(2, 3)) == "narrow"
        assert op(x) == expected


def test_another_device_is_another_choice(op: Op) -> None:
    for _ in range(2):
        assert op.chosen(facts(torch.zeros(2, 3))).name == "narrow"
        assert op.chosen(facts(torch.zeros(2, 3, device="meta"))).name == "eager"


def test_using_is_another_choice(op: Op) -> None:
    x, nothing = torch.zeros(2, 3), torch.zeros(0, 3)
    for _ in range(2):
        assert (op(x), op(nothing)) == ("narrow", "eager")
        with using("reference"):
            assert (op(x), op(nothing)) == ("reference", "reference")
        with using("narrow"):
            assert (op(x), op(nothing)) == ("narrow", "narrow"), "what is forced is not asked whether it pays"
            with pytest.raises(
                BackendError, match="'narrow' was forced and cannot run: takes at most 4 features, got 5"
            ):
                op(torch.zeros(2, 5))


def test_a_backend_that_comes_or_goes_is_seen(op: Op) -> None:
    x = torch.zeros(2, 3)
    assert op(x) == "narrow"
    op.register("faster", lambda x: "faster", priority=5)
    assert op(x) == "faster"
    op.register("faster", lambda x: "slower", priority=95)
    assert op(x) == "narrow"
    op.remove("narrow")
    assert op(x) == "eager"
    assert list(op.backends) == ["eager", "reference", "faster"]
    with pytest.raises(TypeError):
        op.backends["narrow"] = op.backends["eager"]  # type: ignore[index]


def test_threads_do_not_share_what_is_forced(op: Op) -> None:
    together, x = Barrier(2), torch.zeros(2, 3)

    def run(name: str) -> set[str]:
        found = set()
        with using(name):
            for _ in range(200):
                together.wait(timeout=60)
                found.add(op(x))
        return found

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, ("reference", "eager"))) == [{"reference"}, {"eager"}]
    assert op(x) == "narrow"


def test_compiled_code_keeps_nothing(op: Op) -> None:
    def doubled(x: Tensor) -> Tensor:
        return x * (2 if op(x) == "narrow" else 3)

    torch._dynamo.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="eager", dynamic=True)
    for width in (3, 4, 5, 6):
        assert torch.equal(compiled(torch.ones(2, width)), torch.full((2, width), 2.0 if width <= 4 else 3.0))
    assert not op._kept
    with using("reference"):
        assert torch.equal(compiled(torch.ones(2, 3)), torch.full((2, 3), 3.0))


def test_what_is_imported_lazily_compiles_at_its_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_late.py").write_text("def triple(x):\n    return 3 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    triple = lazy("imported_late", "triple")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: triple(x) + 1, fullgraph=True, backend="eager")
    assert "imported_late" not in sys.modules
    for width in (2, 2, 3):
        assert torch.equal(compiled(torch.ones(width)), torch.full((width,), 4.0))
    assert torch.equal(triple(torch.ones(2)), torch.full((2,), 3.0))


def test_capabilities_are_functions() -> None:
    op = Op("capable", facts)
    try:
        op.register("eager", abs, capabilities={"twice": lambda x: 2 * x})
        op.register("reference", abs, priority=90, capabilities=("itself",))
        chosen = op.chosen(facts(torch.zeros(1)))
        assert chosen.capabilities["twice"](3) == 6
        assert "itself" not in chosen.capabilities
        assert op.backends["reference"].capabilities["itself"] is abs
    finally:
        forget(op)


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_is_off_inside(enabled: bool) -> None:
    op = Op("autocast", facts)
    try:
        op.register("eager", lambda x: torch.is_autocast_enabled(x.device.type))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert op(torch.zeros(1)) is False
            assert torch.is_autocast_enabled("cpu") is enabled
    finally:
        forget(op)
