"""Compiles Triton kernels for a GPU that need not be there, and says what they take of it.

A subprocess of its own, without the interpreter that the tests otherwise run kernels in.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Compilation:
    """What to compile.

    Attributes:
        module: that holds the kernel.
        kernel: its name.
        signature: type of every argument that is no constant: ``*bf16``, ``*fp32``, ``*i64``, ``i32``, ``fp32``, ...
        constants: values of the ``tl.constexpr`` arguments.
        options: ``num_warps``, ``num_stages``.
        divisible: integer arguments that are multiples of 16, which a launch finds out by itself; pointers always are,
            but for those of which the kernel says that it is not to be made use of.
        capability: of the GPU.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    divisible: list[str] = field(default_factory=list)
    capability: int = 90


@dataclass(frozen=True)
class Resources:
    """Registers of a thread, bytes of them that spill to memory, and bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int


def compile_all(compilations: list[Compilation]) -> list[Resources]:
    """Compile, and read what the assembler says.

    Raises:
        CalledProcessError: a kernel does not compile; its message is on stderr.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels"],
        input=json.dumps([asdict(each) for each in compilations]),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    return [Resources(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def _compile(each: Compilation) -> Resources:
    import importlib
    import tempfile
    from pathlib import Path

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(each.module), each.kernel)
    function = getattr(function, "fn", function) if not hasattr(function, "arg_names") else function
    signature = {name: "constexpr" if name in each.constants else each.signature[name] for name in function.arg_names}
    ignored = getattr(function, "do_not_specialize_on_alignment", None) or ()
    aligned = [
        place
        for place, name in enumerate(function.arg_names)
        if name in each.divisible or (signature[name].startswith("*") and name not in ignored)
    ]
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    built = triton.compile(
        ASTSource(function, signature, each.constants, attributes),
        target=GPUTarget("cuda", each.capability, 32),
        options=each.options,
    )
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    target = re.search(r"\.target (\w+)", built.asm["ptx"])
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(built.asm["ptx"])
        said = subprocess.run(
            [str(assembler), "-v", f"-arch={target[1]}", str(source), "-o", str(source.with_suffix(".cubin"))],
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        ).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None
    assert spilled is not None
    return Resources(int(registers[1]), int(spilled[1]), built.metadata.shared)


if __name__ == "__main__":
    asked = [Compilation(**each) for each in json.load(sys.stdin)]
    print(json.dumps([asdict(_compile(each)) for each in asked]))
