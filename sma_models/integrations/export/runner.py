"""Running an exported model. This file needs no other of the library: numpy, and ONNX Runtime or PyTorch.

A copy of it lies in every exported folder::

    from runner import Runner            # or, with the library: from sma_models.integrations.export import load

    model = Runner("folder")
    logits, state = model.prefill([[72, 101], [72, 105, 33]])
    logits, state = model.step(logits.argmax(-1), state)

Arrays are NumPy's with ONNX Runtime, and with AOTInductor tensors of PyTorch on the device that the graphs were
compiled for, in the dtypes that ``export.json`` says. What is given may also be lists, arrays or tensors elsewhere.

A state is a dictionary of arrays with the sequences first, named and ordered as in ``export.json``: to copy, reorder,
cut or join sequences, do that to every array of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = Any
State = dict[str, Array]
Graph = Callable[[list[Array]], list[Array]]
STATE, NEXT = "state.", "next_state."


class Runner:
    """The graphs of an exported folder.

    Args:
        folder: what ``sma export`` or :func:`sma_models.integrations.export.folder.export` wrote.
        threads: how many ONNX Runtime may use; None leaves it to choose.
        device: which of the kind that the graphs are for, ``cuda:1`` for instance; None for the current one.

    Attributes:
        about: what ``export.json`` holds.
        overflow: active tokens dropped for lack of capacity so far. It stays 0 with a capacity of 1.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder is of another version, or the device is of another kind or not there.
    """

    VERSION = 2

    def __init__(self, folder: str | Path, *, threads: int | None = None, device: str | None = None) -> None:
        self.folder = Path(folder)
        self.about: dict[str, Any] = json.loads((self.folder / "export.json").read_text("utf-8"))
        if self.about.get("version") != self.VERSION:
            raise ValueError(f"{self.folder}: must be of version {self.VERSION}, got {self.about.get('version')}")
        kind = self.about["device"]
        if device is not None and device.partition(":")[0] != kind:
            raise ValueError(f"device: must be {kind}, for which the graphs were made, got {device}")
        self._by: _Onnx | _AOTInductor = (
            _AOTInductor(device or kind) if self.about["format"] == "aoti" else _Onnx(threads)
        )
        self._graphs: dict[str, Graph] = {}
        self._dtypes: dict[str, str] = {}
        for name, graph in self.about["graphs"].items():
            self._graphs[name] = self._by.start(self.folder / graph["file"], graph)
            self._dtypes.update({each["name"]: each["dtype"] for each in graph["inputs"]})
        beginning = self.folder / "state.npz"
        self._beginning: State = {}
        if beginning.exists():
            with np.load(beginning) as arrays:
                self._beginning = self._arrays(arrays)
        self.overflow = 0

    def _arrays(self, state: Mapping[str, Any]) -> State:
        """A state where the graphs take it."""
        return {name: self._by.array(each, self._dtypes[name]) for name, each in state.items()}

    def initial_state(self, sequences: int) -> State:
        """The state before the first token of so many sequences."""
        return {name: row[[0] * sequences] for name, row in self._beginning.items()}

    def forward(self, **inputs: Array) -> Array:
        """Logits of whole sequences; the inputs by the names in ``export.json``, in the shapes there."""
        logits, overflow = self._run("forward", inputs)
        self._count(overflow)
        return logits

    def prefill(self, prompts: Sequence[Sequence[int]], state: State | None = None) -> tuple[Array, State]:
        """Prefill prompts, of any length each.

        Args:
            prompts: at least one token each.
            state: of as many sequences, before the prompts; None for the beginning.

        Returns:
            Logits ``(n, V)`` of what follows each prompt, and the state after it.

        Raises:
            ValueError: there are none, or one is empty.
        """
        if not len(prompts):
            raise ValueError("prompts: must hold at least one, got none")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{i}]: must hold at least one token")
        batch = self.about["graphs"]["prefill"]["inputs"][0]["shape"][0]
        state = self.initial_state(len(prompts)) if state is None else self._arrays(state)
        logits: list[Array] = []
        after: list[State] = []
        for first in range(0, len(prompts), batch):
            rows = slice(first, first + batch)
            one, read = self._prefill(prompts[rows], {name: each[rows] for name, each in state.items()})
            logits.append(one)
            after.append(read)
        joined = {name: self._by.xp.concatenate([each[name] for each in after]) for name in state}
        return self._by.xp.concatenate(logits), joined

    def _prefill(self, prompts: Sequence[Sequence[int]], state: State) -> tuple[Array, State]:
        """The same for at most as many prompts as the graph takes; rows without a prompt get no tokens."""
        batch, chunk = self.about["graphs"]["prefill"]["inputs"][0]["shape"]
        n = len(prompts)
        blank = self.initial_state(batch - n)
        state = {name: self._by.xp.concatenate([rows, blank[name]]) for name, rows in state.items()}
        logits: Array | None = None
        for start in range(0, max(map(len, prompts)), chunk):
            tokens, lengths = np.zeros((batch, chunk), np.int64), np.zeros(batch, np.int64)
            for row, prompt in enumerate(prompts):
                part = prompt[start : start + chunk]
                tokens[row, : len(part)], lengths[row] = part, len(part)
            new, overflow, *after = self._run("prefill", {"tokens": tokens, "lengths": lengths, **state})
            self._count(overflow)
            read = self._by.array(lengths[:, None] > 0, "bool")
            logits = new if logits is None else self._by.xp.where(read, new, logits)
            state = dict(zip(state, after, strict=True))
        assert logits is not None
        return logits[:n], {name: rows[:n] for name, rows in state.items()}

    def step(self, tokens: Array, state: State, live: Array | None = None) -> tuple[Array, State]:
        """One more token of every sequence.

        Args:
            tokens: ``(n,)``.
            state: before them.
            live: ``(n,)`` bool, the sequences that take a token; None for all. The others do not change.

        Returns:
            Logits ``(n, V)`` of what follows, and the state.
        """
        tokens = self._by.array(tokens, "int64")
        live = self._by.xp.ones_like(tokens, dtype=bool) if live is None else live
        logits, *after = self._run("step", {"tokens": tokens, "live": live, **state})
        return logits, dict(zip(state, after, strict=True))

    def stream(
        self, prompts: Sequence[Sequence[int]], *, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[Array]:
        """Yield one new token ``(n,)`` of each prompt, without end; temperature 0 takes the most likely one."""
        logits, state = self.prefill(prompts)
        random = np.random.default_rng(seed)
        while True:
            if temperature > 0:  # the largest of logits with such noise is a draw from their softmax
                noise = self._by.array(random.gumbel(size=tuple(logits.shape)), "float64")
                logits = self._by.array(logits, "float64") / temperature + noise
            tokens = logits.argmax(-1)
            yield tokens
            logits, state = self.step(tokens, state)

    def _run(self, name: str, inputs: Mapping[str, Array]) -> list[Array]:
        graph = self.about["graphs"].get(name)
        if graph is None:
            raise ValueError(f"{self.folder}: holds no graph {name!r}, it holds {', '.join(self.about['graphs'])}")
        ordered: list[Array] = []
        for wanted in graph["inputs"]:
            given, shape = inputs.get(wanted["name"]), wanted["shape"]
            value = None if given is None else self._by.array(given, wanted["dtype"])
            if value is None or not _fits(value.shape, shape):
                got = "nothing" if value is None else f"{tuple(value.shape)}"
                raise ValueError(f"{name}: {wanted['name']} must be {tuple(shape)}, None being the batch, got {got}")
            ordered.append(value)
        return self._graphs[name](ordered)

    def _count(self, overflow: Array) -> None:
        if int(overflow):
            self.overflow += int(overflow)
            warnings.warn(
                f"{int(overflow)} active tokens were dropped for lack of capacity; export with a larger one",
                stacklevel=4,
            )


def _fits(shape: tuple[int, ...], rule: Sequence[int | None]) -> bool:
    return len(shape) == len(rule) and all(size in (None, have) for size, have in zip(rule, shape, strict=True))


class _Onnx:
    """Graphs by ONNX Runtime, on NumPy arrays."""

    xp: Any = np

    def __init__(self, threads: int | None) -> None:
        self._threads = threads

    def array(self, value: Any, dtype: str) -> Array:
        """A value as the graphs take it."""
        return np.ascontiguousarray(value, dtype=dtype)

    def start(self, path: Path, graph: Mapping[str, Any]) -> Graph:
        """What runs a graph."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        session = onnxruntime.InferenceSession(str(path), options)
        names = [each["name"] for each in graph["inputs"]]

        def run(inputs: list[Array]) -> list[Array]:
            outputs: list[Array] = session.run(graph["outputs"], dict(zip(names, inputs, strict=True)))
            return outputs

        return run


class _AOTInductor:
    """Graphs that AOTInductor compiled, by PyTorch, on tensors of a device. Its threads are those of PyTorch."""

    def __init__(self, device: str) -> None:
        import torch

        self.xp: Any = torch
        self._device = torch.device(device)
        if self._device.type == "cuda":
            count = torch.cuda.device_count()
            if (self._device.index or 0) >= count:
                raise ValueError(f"device: must be one of {count} that this PyTorch can use here, got {device}")
            if self._device.index is None:
                self._device = torch.device("cuda", torch.cuda.current_device())

    def array(self, value: Any, dtype: str) -> Array:
        """A value as the graphs take it: on their device, contiguous and aligned as compiled code assumes."""
        tensor = self.xp.as_tensor(value).to(self._device, getattr(self.xp, dtype))
        if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
            return tensor
        return tensor.clone(memory_format=self.xp.contiguous_format)

    def start(self, path: Path, graph: Mapping[str, Any]) -> Graph:
        """What runs a graph."""
        index = self._device.index if self._device.type == "cuda" else -1
        compiled = self.xp._inductor.aoti_load_package(str(path), device_index=index)

        def run(inputs: list[Array]) -> list[Array]:
            with self.xp.no_grad():
                return list(compiled(*inputs))

        return run


def main() -> None:
    """Continue a text with a model of bytes: ``python runner.py "Once upon a time"``."""
    parser = argparse.ArgumentParser(description="Continue a text with an exported model of bytes.")
    parser.add_argument("prompt")
    parser.add_argument("--folder", default=Path(__file__).parent, type=Path)
    parser.add_argument("--device", default=None, help="cuda:1, for instance; by default the current one")
    parser.add_argument("--tokens", default=100, type=int, help="how many new ones")
    parser.add_argument("--temperature", default=0.0, type=float)
    parser.add_argument("--seed", default=None, type=int)
    options = parser.parse_args()
    model = Runner(options.folder, device=options.device)
    stream = model.stream([list(options.prompt.encode())], temperature=options.temperature, seed=options.seed)
    new = bytes(int(next(stream)[0]) for _ in range(options.tokens))
    sys.stdout.write(options.prompt + new.decode("utf-8", "replace") + "\n")


if __name__ == "__main__":
    main()
