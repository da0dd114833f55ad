"""Each tool makes a plain projection one that has to be called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules import module as torch_module

from sma.runtime.plain import is_plain
from tests.tools.test_adapters import adapted
from tests.tools.test_quantised import QUANTISERS, pytestmark  # noqa: F401  # with the warnings that it expects
from tests.tools.tools import TOOLS


def nothing(*_: Any) -> None:
    """A hook."""


def in_place(module: nn.Module) -> nn.Module:
    module[0].compile(backend="eager")  # type: ignore[index,operator]
    return module


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    **{tool.name: tool.apply for tool in TOOLS if tool.name != "prune, removed"},
    **{
        name: lambda model, name=name: getattr(model[0], name)(nothing)  # type: ignore[misc]
        for name in (
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        )
    },
    "lora": adapted,
    "torch.compile": lambda model: nn.Sequential(torch.compile(model[0], backend="eager")),
    "compile()": in_place,
    "checkpoint_wrapper": lambda model: nn.Sequential(checkpoint_wrapper(model[0])),
    **QUANTISERS,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_tool_makes_it_not_plain(change: Callable[[nn.Sequential], Any]) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    assert is_plain(model[0])
    result = change(model)
    changed = result if isinstance(result, nn.Sequential) else model
    assert not is_plain(changed[0])


def test_what_a_tool_has_left_is_plain_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    next(tool for tool in TOOLS if tool.name == "prune, removed").apply(model)
    assert is_plain(model[0])
    model[0].register_forward_hook(nothing).remove()
    assert is_plain(model[0])


@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ],
)
def test_nothing_is_plain_under_a_global_hook(register: Callable[..., Any]) -> None:
    linear = nn.Linear(4, 4)
    handle = register(nothing)
    assert not is_plain(linear)
    handle.remove()
    assert is_plain(linear)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_sharded_one_is_not_plain() -> None:
    linear = nn.Linear(4, 4)
    fully_shard(linear, mesh=init_device_mesh("cpu", (1,)))
    assert not is_plain(linear)
