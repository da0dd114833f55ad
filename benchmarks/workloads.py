"""The workloads: batches of one shape, and the models or modules that are compared on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks import decoding, peers
from benchmarks.modules import dense_ffn, ema, experts, mixture, published_ema, sparse_ffn
from benchmarks.rows import (
    BYTES,
    FLASH_GRAPH,
    GLA,
    LM,
    RETNET,
    Row,
    linear_attention,
    model,
    prefills,
    published,
    transformer,
    with_capacity,
)
from benchmarks.subjects import SyntheticTask


@dataclass(frozen=True)
class Workload:
    """A batch of one shape and what is compared on it.

    Attributes:
        title: what it is, for people.
        batch: sequences.
        length: tokens of each.
        rows: in the order in which they take turns.
        ours: label of the row that stands for the library.
        peer: label of the row that everything is compared with.
        train: what the first number is.
        device: where it is measured at full size.
    """

    title: str
    batch: int
    length: int
    rows: tuple[Row, ...]
    ours: str
    peer: str
    train: Literal["training step", "forward and backward", "forward pass only"] = "training step"
    device: str = "cuda"


def _task(
    spec: str,
    shares: tuple[float, ...],
    *extra: Row,
    task: SyntheticTask = BYTES,
    flash: tuple[int, ...] = (4, 256, 4, 1024),
) -> dict[str, Any]:
    """The rows of one of the paper's tasks; the first share stands for the library.

    Every row that can be captured as a graph is: then the processor that launches the kernels does not matter.
    """
    rows = (
        *(with_capacity(spec, share) for share in shares),
        model(f"ours r={shares[0]:g}", spec, share=shares[0]),
        transformer(task, *flash, graph=True),
        transformer(task, *flash),
        *extra,
        published(spec, shares[0]),
    )
    return {"rows": rows, "ours": f"ours r={shares[0]:g}, graph", "peer": FLASH_GRAPH}


def _text() -> Workload:
    extra = (
        model("MEGA-chunk 128, graph", "mega_chunk_text", graph=True),
        linear_attention("GLA", BYTES, 4, graph=True, **GLA),
    )
    rows = _task("seqboat_text", (0.15, 0.05, 0.3, 0.5), *extra)
    return Workload("LRA Text, 50 x 4,096 bytes, 4 layers of 128 / 256 / 64", 50, 4096, **rows)


def _listops() -> Workload:
    rows = _task("seqboat_listops", (0.3,), task=SyntheticTask(16, 10))
    return Workload("LRA ListOps, 64 x 2,048 tokens, 6 layers of 80 / 160 / 64", 64, 2048, **rows)


def _image() -> Workload:
    rows = _task("seqboat_image", (0.5,), task=SyntheticTask(None, 10))
    return Workload("LRA Image, 50 x 1,024 pixels, 8 layers of 160 / 320 / 96", 50, 1024, **rows)


def _speech() -> Workload:
    # The MEGA-chunk of Text with the sizes of Speech.
    sizes = ("vocab_size=null", "n_classes=10", "d_model=60", "n_layers=8", "dropout=0", "head_dropout=0")
    block = ("dropout=0", "prenorm=true", "norm=batchnorm", "mixer.truncation=4000", "ffn.d_hidden=120")
    unit = ("d_qk=30", "d_v=120", "chunk=1000", "max_positions=1000")
    overrides = (*sizes, *(f"blocks[0].{each}" for each in (*block, *(f"attention.{each}" for each in unit))))
    rows = _task(
        "seqboat_speech",
        (0.1,),
        model("MEGA-chunk 1000, graph", "mega_chunk_text", *overrides, graph=True),
        task=SyntheticTask(None, 10),
    )
    return Workload("Speech commands, 20 x 16,000 samples, 8 layers of 60 / 120 / 30", 20, 16000, **rows)


def _language() -> Workload:
    extra = (
        model("MEGA-chunk 1024, graph", "mega_lm", graph=True),
        linear_attention("RetNet", LM, 12, graph=True, **RETNET),
    )
    rows = _task("seqboat_lm", (0.3,), *extra, task=LM, flash=(12, 512, 8, 2048))
    return Workload("Language model, 1 x 8,192 bytes, 14 layers of 616 / 1,232 / 128", 1, 8192, **rows)


def _ema(causal: bool) -> Workload:
    rows = (
        ema(causal, None, graph=True),
        ema(causal, torch.float32, graph=True),
        ema(causal, None),
        published_ema(causal),
    )
    title = f"Moving average, {'causal' if causal else 'bidirectional'}, 50 x 4,096 x 128, 16 states"
    return Workload(title, 50, 4096, rows, "ours, graph", "published, float32", train="forward and backward")


def _ffn() -> Workload:
    rows = (
        *(sparse_ffn(1024, 4096, share, graph=True) for share in (0.25, 0.1, 0.5, 0.75, 1.0)),
        sparse_ffn(1024, 4096, 0.25),
        dense_ffn(1024, 4096, graph=True),
        dense_ffn(1024, 4096),
    )
    title = "SparselyActivated(FFN), 1,024 to 4,096, 16K tokens"
    return Workload(title, 4, 4096, rows, "ours r=0.25, graph", "dense, graph", train="forward and backward")


def _experts() -> Workload:
    rows = (
        experts("ours", mixture, ours=True, graph=True),
        experts("grouped_mm", peers.PlainExperts, graph=True),
        experts("ours", mixture, ours=True),
        experts("grouped_mm", peers.PlainExperts),
        experts("ScatterMoE", peers.ScatterExperts),
    )
    title = "Mixture of 8 gated experts, 2 a token, 1,024 to 2,048, 16K tokens"
    return Workload(title, 4, 4096, rows, "ours, graph", "grouped_mm, graph", train="forward and backward")


def _prefill(length: int) -> Workload:
    title = f"Prefill of {length:,} tokens at batch 1, language models of about 40M parameters"
    return Workload(title, 1, length, prefills(length), "ours r=0.3, graph", FLASH_GRAPH, train="forward pass only")


def _decoding(batch: int, context: int) -> Workload:
    title = f"A decoding step at batch {batch} after {context:,} tokens, language models of about 40M parameters"
    peer = "Llama, static cache, graph"
    return Workload(title, batch, context, decoding.rows(), "ours r=0.3, graph", peer, train="forward pass only")


def _cpu_text() -> Workload:
    spec, share = "seqboat_text", 0.15
    rows = (model("ours r=0.15", spec, share=share), published(spec, share), transformer(BYTES, 4, 256, 4, 1024))
    title = "LRA Text on a CPU, 4 x 2,048 bytes"
    return Workload(title, 4, 2048, rows, "ours r=0.15", "published r=0.15", device="cpu")


def _cpu_lm() -> Workload:
    unit = ("d_qk=64", "d_v=256", "window=64")
    sizes = ("d_model=128", "n_layers=3", *(f"blocks[0].activate.module.{each}" for each in unit))
    rows = (model("ours r=0.3", "seqboat_lm", *sizes, share=0.3), published("seqboat_lm", 0.3, *sizes))
    title = "Language model on a CPU, 8 x 512 bytes, 3 layers of 128 / 256 / 64, window 64"
    return Workload(title, 8, 512, rows, "ours r=0.3", "published r=0.3", device="cpu")


WORKLOADS: dict[str, Workload] = {
    "text-4k": _text(),
    "listops-2k": _listops(),
    "image-1k": _image(),
    "speech-16k": _speech(),
    "lm-8k": _language(),
    "ema-bidirectional": _ema(causal=False),
    "ema-causal": _ema(causal=True),
    "ffn": _ffn(),
    "experts": _experts(),
    **{f"prefill-{length}k": _prefill(1024 * length) for length in (8, 64, 256)},
    **{f"decode-{b}-{length}k": _decoding(b, 1024 * length) for b, length in ((1, 1), (1, 64), (32, 1), (32, 48))},
    "cpu-text": _cpu_text(),
    "cpu-lm": _cpu_lm(),
}
