"""Where the time of a training step goes: kernels by what they do, against what the device could do at best."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast  # a launch in it is linked to it, unlike with record_function
from torch.profiler import ProfilerActivity

from benchmarks.rows import load, model
from benchmarks.subjects import Setting
from benchmarks.tables import PROFILE_HEAD, milliseconds, profile_cells, text_table
from benchmarks.timing import Clock
from sma.ops import Op

OURS = "sma::"

PROFILED = {
    "text-4k": ("seqboat_text", 0.15),
    "listops-2k": ("seqboat_listops", 0.3),
    "image-1k": ("seqboat_image", 0.5),
    "speech-16k": ("seqboat_speech", 0.1),
    "lm-8k": ("seqboat_lm", 0.3),
}
"""Workload to spec and share of active tokens."""

GROUPS = (
    ("optimiser", r"adam|multi_tensor"),
    ("EMA", r"(^|[_:])ema(_|:|$)|fft|convolution"),
    ("attention", r"attention|attn|gau|flash|fmha|softmax_warp|bmm"),
    ("routing and compress", r"rout|narrow|compress|decide|pack|cumsum|scan|nonzero|sort|cub|index|gather|take"),
    ("merge", r"merge|extract|scatter|combine"),
    ("norm", r"norm"),
    ("projections", r"gemm|nvjet|cutlass|cublas|matmul|addmm|::mm|splitk|linear|feed_forward|expert"),
    ("copies and casts", r"memcpy|memset|copy|cast|convert|fill|zero"),
    ("loss", r"cross_entropy|nll|log_softmax|logsoftmax"),
    ("element by element", r"elementwise|reduce|dropout|bernoulli|silu|gelu|sigmoid|::(mul|add|sub|div|exp|sum)"),
)
"""The first pattern found says what a kernel does; the rest is ``other``."""


def group_of(kernel: str, path: Sequence[str] = ()) -> str:
    """What a kernel does.

    Args:
        kernel: its name.
        path: what launched it, the innermost first. An operation of ours among them decides; otherwise the kernel's
            own name does, and where that says nothing, what launched it.
    """
    own = next((name for name in path if name.startswith(OURS)), None)
    for name in (own,) if own else (kernel, *path):
        for group, pattern in GROUPS:
            if re.search(pattern, name.lower()):
                return group
    return "other"


@dataclass(frozen=True)
class Ceilings:
    """What the device did at best in this run: bytes read or written, and floating-point operations, a second."""

    bandwidth: float
    arithmetic: float

    def floor_ms(self, work: Work) -> float:
        """The time below which the work cannot be done."""
        return 1e3 * max(work.moved / self.bandwidth, work.operations / self.arithmetic)


@dataclass(frozen=True)
class Work:
    """Bytes that have to be read or written, and floating-point operations, in one training step."""

    moved: float = 0.0
    operations: float = 0.0


def ceilings(setting: Setting) -> Ceilings:
    """Measure them: a copy of a large tensor, and a product of two large square matrices."""
    big = setting.device.type == "cuda"
    size, side = (2**28, 8192) if big else (2**22, 512)
    source = torch.zeros(size, device=setting.device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=setting.device, dtype=setting.dtype)
    clock = Clock(setting.device)
    copied = _best(lambda: target.copy_(source), clock)
    multiplied = _best(lambda: torch.mm(a, a), clock)
    return Ceilings(2 * source.nbytes / copied, 2 * side**3 / multiplied)


def _best(run: Callable[[], Any], clock: Clock, tries: int = 10) -> float:
    times = []
    for _ in range(tries):
        start = clock.now()
        run()
        times.append(clock.now() - start)
    return min(times[1:])


def work_of(config: Any, setting: Setting, share: float, parameters: int) -> dict[str, Work]:
    """What one training step of a SeqBoat cannot do without, by group.

    Forward reads the input of each group and writes its output; backward reads the input and the gradient of the
    output, and writes the gradient of the input. Products count forward once and backward twice, attention forward once
    and backward two and a half times. Fused groups can do with less than the sum.
    """
    block, width = config.blocks[0], config.d_model
    gau = block.activate.module
    value = gau.d_v or 2 * width
    layers, tokens = config.n_layers, setting.batch * setting.length
    active = share * tokens
    size = 2 if setting.dtype != torch.float32 else 4
    causal = hasattr(config, "tie_embeddings")
    seen = min(gau.window + 1 if causal else 2 * gau.window + 1, share * setting.length)
    row = layers * width * size  # bytes of one token in all layers
    logits = (config.vocab_size if causal else 0) or 0
    # Inputs and outputs of the three products; the weights are small.
    rows = (2 * width + 2) * tokens + (2 * width + gau.d_qk + 3 * value) * active
    products = width * (width + 2) * tokens + (width * (gau.d_qk + 2 * value) + value * width) * active
    head = tokens * width * logits
    return {
        "EMA": Work(5 * row * tokens),
        "norm": Work(5 * row * tokens),
        "projections": Work(3 * layers * size * rows, 6 * (layers * products + head)),
        "routing and compress": Work(4 * row * active),
        "attention": Work(
            3 * layers * size * active * 2 * (gau.d_qk + value), 7 * layers * active * seen * (gau.d_qk + value)
        ),
        # Read skip, residual and the module's rows, write the sum; backward the other way round.
        "merge": Work(2 * row * (3 * tokens + active)),
        "loss": Work(2 * 4 * tokens * logits),
        "optimiser": Work(7 * 4 * parameters),
    }


def profile_of(name: str, setting: Setting, limits: Ceilings, steps: int = 3) -> dict[str, Any]:
    """Profile the training step of one workload, to a mapping for the results."""
    spec, share = PROFILED[name]
    subject = model(f"ours r={share:g}", spec, share=share).build(setting)
    assert subject.train is not None
    clock = Clock(setting.device)
    for _ in range(3):
        subject.train()
    start = clock.now()
    for _ in range(steps):
        subject.train()
    wall = 1e3 * (clock.now() - start) / steps
    kernels = _kernels(subject.train, setting, steps)
    work = work_of(load(spec, setting), setting, subject.share or share, subject.parameters)
    groups = []
    for group in dict.fromkeys([*(group for group, _ in GROUPS), "other"]):
        members = [kernel for kernel in kernels if kernel["group"] == group]
        floor = limits.floor_ms(work[group]) if group in work else None
        if members or floor:
            times = {"ms": sum(each["ms"] for each in members), "calls": sum(each["calls"] for each in members)}
            groups.append({"group": group, **times, "floor_ms": floor})
    about = {"workload": name, "share": subject.share, "wall_ms": wall, "ceilings": asdict(limits)}
    return {**about, "groups": groups, "kernels": sorted(kernels, key=lambda kernel: -kernel["ms"])[:40]}


def _kernels(train: Callable[[], None], setting: Setting, steps: int) -> list[dict[str, Any]]:
    """Time and number of calls in one step of every kernel (on a CPU: of every operation), by group and name."""
    on_gpu = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with named_operations(), torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            train()
        Clock(setting.device).now()
    total: defaultdict[tuple[str, str], float] = defaultdict(float)
    calls: Counter[tuple[str, str]] = Counter()
    for name, path, microseconds in spent(profiler.events(), on_gpu):
        # Kernels of ours have the same names; the launch shows their operation.
        named = path[0] if path and path[0].startswith(OURS) and path[0].endswith(name) else name
        total[group_of(name, path), named[:160]] += microseconds
        calls[group_of(name, path), named[:160]] += 1
    return [
        {"group": group, "name": name, "ms": total[group, name] / 1e3 / steps, "calls": calls[group, name] / steps}
        for group, name in total
    ]


def spent(events: Iterable[Any], on_gpu: bool) -> Iterator[tuple[str, list[str], float]]:
    """Name, what launched it (the innermost first) and microseconds of every kernel, or on a CPU of every operation."""
    events = list(events)
    missing: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if str(event.device_type).endswith("CUDA"):
            # Kernels that nothing is known to have launched are counted without a path.
            if on_gpu and not event.is_user_annotation:
                missing[event.name] += event.time_range.elapsed_us()
        elif on_gpu:
            for kernel in event.kernels:
                missing[kernel.name] -= kernel.duration
                yield kernel.name, _path(event), kernel.duration
        elif not event.is_user_annotation:
            yield event.name, _path(event)[1:], event.self_cpu_time_total
    for name, microseconds in missing.items():
        if microseconds > 1:
            yield name, [], microseconds


def _path(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


@contextmanager
def named_operations() -> Iterator[None]:
    """Inside the ``with`` block the profiler sees operations of ours, and launches of Triton kernels, by name."""
    with ExitStack() as stack:
        for method in ("__call__", "run"):
            stack.enter_context(_wrapped(Op, method, lambda op: f"{OURS}{op.name}"))
        with suppress(ImportError):
            from triton.runtime.jit import JITFunction

            stack.enter_context(_wrapped(JITFunction, "run", _kernel_name))
        yield


def _kernel_name(function: Any) -> str:
    """``sma::<operation>::<kernel>`` for ours, which lie in a folder that is called like the operation."""
    place = str(function.fn.__module__).split(".")
    operation = place[place.index("triton_kernel") - 1] if "triton_kernel" in place else place[-1]
    return f"{OURS if place[0].startswith('sma') else ''}{operation}::{function.fn.__name__}"


@contextmanager
def _wrapped(cls: Any, method: str, name: Callable[[Any], str]) -> Iterator[None]:
    """A method of a class under a name of its own in the profile."""
    original = getattr(cls, method)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _RecordFunctionFast(name(self)):
            return original(self, *args, **kwargs)

    setattr(cls, method, run)
    try:
        yield
    finally:
        setattr(cls, method, original)


def show(profile: dict[str, Any]) -> str:
    """A table of one profile for the terminal, with the longest kernels first."""
    top = [
        f"{milliseconds(each['ms']):>8} ms {each['calls']:6.0f} x  [{each['group']}] {each['name'][:90]}"
        for each in profile["kernels"][:12]
    ]
    title = f"{profile['workload']}, r {profile['share']:.2f}: a training step of {milliseconds(profile['wall_ms'])} ms"
    return "\n".join(["", *top, title, text_table(PROFILE_HEAD, profile_cells(profile))])
