"""Settings of every test: one thread, fixed seeds, repeatable hypothesis, shapes in annotations checked."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.nn.modules import module as torch_module

from tests.shapes import check_annotated_shapes

# Before the first import of triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before the first import of these packages. Only the operations: their annotations say every shape.
check_annotated_shapes("sma.ops", "sma_modules.ops")

settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("SMA_HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each process: the tests are small, and pytest-xdist already uses the cores."""
    torch.set_num_threads(1)


GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
OPTIONAL = {"scatter": ("torch_scatter", "SMA_REQUIRE_SCATTER"), "lm_eval": ("lm_eval", "SMA_REQUIRE_LM_EVAL")}
"""By marker: the package that a test needs, and the variable that makes its absence a failure."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test of an optional package is skipped without it, or fails where the package is required."""
    for marker, (package, variable) in OPTIONAL.items():
        if item.get_closest_marker(marker) is None or importlib.util.find_spec(package) is not None:
            continue
        if os.environ.get(variable) == "1":
            pytest.fail(f"{package} is not installed, and {variable}=1 asks for it", pytrace=False)
        pytest.skip(f"{package} is not installed; `make test-{marker.replace('_', '-')}` gets it and runs this test")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers in every test, whatever ran before it; global switches are put back."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def _no_global_hooks_left() -> Iterator[None]:
    """A test that leaves a global module hook behind fails: while there is one, no part of any model is plain."""
    before = [len(hooks) for hooks in GLOBAL_HOOKS]
    yield
    left = [len(hooks) for hooks in GLOBAL_HOOKS]
    for hooks in GLOBAL_HOOKS:
        hooks.clear()
    assert left == before, f"global module hooks: {before} before the test, {left} after it"


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator, for tests that draw their own data."""
    return torch.Generator().manual_seed(0)
