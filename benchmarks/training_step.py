"""Time whole training steps (forward, backward, Adam) and forward passes of shipped specs, side by side.

    python benchmarks/training_step.py                        # every workload at full size, on the GPU if there is one
    python benchmarks/training_step.py text-4k --batch 4 --length 2048 --device cpu --dtype float32

The share of activated tokens is forced, so that models of the same sizes do the same work. All rows of a run are
measured one after the other in the same process, several rounds, so that ratios between rows are worth more than the
milliseconds. Prints a table; with ``--json FILE`` also writes every round's time, the versions and the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sma
from sma_models.heads import LanguageModel


@dataclass(frozen=True)
class Workload:
    """A batch of one shape, and the models that are compared on it: label -> (spec, overrides)."""

    batch: int
    length: int
    models: dict[str, tuple[str, ...]]


def rate(share: float) -> str:
    """The override that forces a share of activated tokens."""
    return f"blocks[0].activate.configurator={{type: fixed_rate, rate: {share}}}"


WORKLOADS = {
    "text-4k": Workload(
        50,
        4096,
        {
            "SeqBoat r=.05": ("seqboat_text", rate(0.05)),
            "SeqBoat r=.15": ("seqboat_text", rate(0.15)),
            "SeqBoat r=.5": ("seqboat_text", rate(0.5)),
            "MEGA-chunk 128": ("mega_chunk_text",),
            "Transformer, SDPA": ("transformer_text",),
        },
    ),
    "listops-2k": Workload(64, 2048, {"SeqBoat r=.3": ("seqboat_listops", rate(0.3))}),
    "image-1k": Workload(50, 1024, {"SeqBoat r=.5": ("seqboat_image", rate(0.5))}),
    "speech-16k": Workload(20, 16000, {"SeqBoat r=.1": ("seqboat_speech", rate(0.1))}),
    "lm-8k": Workload(
        1,
        8192,
        {
            "SeqBoat r=.3": ("seqboat_lm", rate(0.3)),
            "MEGA-chunk 1024": ("mega_lm",),
            "Transformer, window 1024": ("transformer_lm",),
        },
    ),
}


@dataclass(frozen=True)
class Row:
    """What was measured of one model: milliseconds of every round, and the peak of allocated memory in MiB (GPU
    only).
    """

    workload: str
    model: str
    parameters: int
    train_ms: list[float]
    forward_ms: list[float]
    train_mib: float | None


class Bench:
    """Builds models and inputs, and times them on one device in one precision."""

    def __init__(self, device: str, dtype: torch.dtype, rounds: int) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.rounds = rounds

    def measure(self, name: str, workload: Workload, label: str) -> Row:
        """One row of the table."""
        torch.manual_seed(0)
        spec, *overrides = workload.models[label]
        model = sma.build(spec, *overrides).to(self.device)
        inputs, loss_of = self._problem(model, workload)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)

        def step() -> None:
            optimiser.zero_grad()
            with self._precision():
                loss = loss_of(model(inputs).logits)
            loss.backward()
            optimiser.step()

        @torch.no_grad()
        def forward() -> None:
            with self._precision():
                model(inputs)

        train = self._time(step)
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else None
        model.eval()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return Row(name, label, parameters, train, self._time(forward), peak)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _problem(self, model: nn.Module, workload: Workload) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        shape = (workload.batch, workload.length)
        if model.vocab_size is None:
            inputs = torch.randn(shape, device=self.device)
        else:
            inputs = torch.randint(0, model.vocab_size - 1, shape, device=self.device)
        language = isinstance(model, LanguageModel)
        targets = (
            inputs.roll(-1, 1).flatten() if language else torch.zeros(shape[0], dtype=torch.int64, device=self.device)
        )
        return inputs, lambda logits: F.cross_entropy(logits.float().flatten(0, -2), targets)

    def _time(self, run: Callable[[], None]) -> list[float]:
        for _ in range(2):
            run()
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            run()
            self._wait()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()}"
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sma": sma.__version__,
    }


def show(row: Row, baseline: Row) -> str:
    """A line of the table; the ratio is to the first row of the workload."""
    train, forward = statistics.median(row.train_ms), statistics.median(row.forward_ms)
    spread = f"{min(row.train_ms):.1f}..{max(row.train_ms):.1f}"
    ratio = train / statistics.median(baseline.train_ms)
    memory = "-" if row.train_mib is None else f"{row.train_mib:,.0f}"
    return f"{row.workload:<11} {row.model:<25} {train:>9.1f} {spread:>18} {ratio:>6.2f} {forward:>10.1f} {memory:>9}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--batch", type=int, help="instead of the workload's own")
    parser.add_argument("--length", type=int, help="instead of the workload's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    unknown = [name for name in options.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload named {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    bench = Bench(options.device, getattr(torch, dtype), options.rounds)
    about = environment(bench.device) | {"dtype": dtype}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    header = f"{'workload':<11} {'model':<25} {'train ms':>9} {'min..max':>18} {'ratio':>6}"
    print(f"{header} {'forward ms':>10} {'peak MiB':>9}")
    rows: list[Row] = []
    for name in options.workloads or WORKLOADS:
        full = WORKLOADS[name]
        workload = Workload(options.batch or full.batch, options.length or full.length, full.models)
        first: Row | None = None
        for label in workload.models:
            row = bench.measure(name, workload, label)
            first = first or row
            rows.append(row)
            print(show(row, first), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
