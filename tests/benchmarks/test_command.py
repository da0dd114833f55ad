"""The command at a size at which it runs in a moment, and the pages and figures that are made of what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sma
from benchmarks import pages, peers
from benchmarks.__main__ import main
from benchmarks.figures import draw
from benchmarks.profiles import Ceilings, Work, group_of, spent
from benchmarks.rows import BYTES, LM, load
from benchmarks.shares import Ours
from benchmarks.subjects import Setting, model_subject
from benchmarks.sweeps import crossover
from benchmarks.tables import HEAD, remarks, workload_cells
from benchmarks.workloads import WORKLOADS
from sma.weights import save
from tests.models.tiny import tiny

SMALL = ["--device", "cpu", "--scale", "small", "--rounds", "2"]
STANDALONE = """
import torch
class SeqBoatLayer(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        width = options["embed_dim"]
        self.q_router, self.hx_proj = torch.nn.Softmax(-1), torch.nn.Linear(width, 2 + width)
    def forward(self, x):
        hx = self.hx_proj(x)
        return hx[..., 2:] + self.q_router(hx[..., :2])[..., 1:]
class MultiHeadEMA(torch.nn.Identity): ...
"""


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("results")
    (folder / "standalone.py").write_text(STANDALONE)
    options = ["--json", str(folder / "run.json"), "--reference", str(folder / "standalone.py")]
    main(["cpu-lm", "ffn", "text-4k", "--rows", "r=0.15,r=0.3,r=0.25,dense,GLA", *SMALL, *options])
    content: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return content


def test_every_row_is_there(record: dict[str, Any]) -> None:
    assert set(record["workloads"]) == {"cpu-lm", "ffn", "text-4k"}
    for key in ("device", "dtype", "torch", "python", "sma", "date", "scale", "commit", "triton"):
        assert key in record["environment"]
    rows = {(row["workload"], row["model"]): row for row in record["rows"]}
    for key in (("cpu-lm", "ours r=0.3"), ("cpu-lm", "published r=0.3"), ("ffn", "dense"), ("text-4k", "ours r=0.15")):
        row = rows[key]
        assert row["error"] is None
        assert len(row["train_ms"]) == len(row["forward_ms"]) == 2
        assert min(row["train_ms"] + row["forward_ms"]) > 0
        assert row["parameters"] > 0
    assert rows["cpu-lm", "ours r=0.3"]["share"] == pytest.approx(0.3, abs=0.03)
    assert rows["cpu-lm", "published r=0.3"]["share"] == pytest.approx(0.3, abs=0.03)
    assert rows["cpu-lm", "ours r=0.3"]["backends"]["window_attention"] == "eager"
    assert rows["ffn", "dense"]["share"] is None
    graph = rows["text-4k", "ours r=0.15, graph"]
    assert graph["train_ms"] is None
    assert graph["error"].startswith("not available: ")


def test_decoding_steps_are_timed(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    main(["decode-1-1k", "--rows", "ours,Llama", *SMALL, "--json", str(path)])
    rows = {row["model"]: row for row in json.loads(path.read_text())["rows"]}
    assert len(rows) == 4
    assert rows["ours r=0.3"]["error"] is None
    assert len(rows["ours r=0.3"]["forward_ms"]) == 2
    assert rows["ours r=0.3"]["train_ms"] is None
    assert 0 < rows["ours r=0.3"]["share"] < 1
    assert rows["ours r=0.3"]["backends"]["ring_attention"] == "eager"
    assert rows["ours r=0.3, graph"]["error"].startswith("not available: ")
    llama = rows["Llama, static cache"]  # transformers is an extra
    assert (llama["error"] or "").startswith("not available: ") or len(llama["forward_ms"]) == 2


def test_steps_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import decoding

    monkeypatch.setattr(decoding, "TOLERANCE", -1.0)
    setting = Setting(torch.device("cpu"), torch.float32, batch=1, length=40).small()
    with pytest.raises(RuntimeError, match="not timed, its results are wrong: steps are"):
        decoding.ours("ours", captured=False).build(setting)


def test_the_table_compares_with_ours_and_the_peer(record: dict[str, Any]) -> None:
    rows = [row for row in record["rows"] if row["workload"] == "cpu-lm"]
    cells = {line[0]: line for line in workload_cells(rows, record["workloads"]["cpu-lm"])}
    ours, other = rows[0], rows[1]
    assert (ours["model"], other["model"]) == ("ours r=0.3", "published r=0.3")
    assert cells["ours r=0.3"][4] == f"{median(other['train_ms']) / median(ours['train_ms']):.2f}"
    assert cells["published r=0.3"][5] == f"{median(ours['train_ms']) / median(other['train_ms']):.2f}"
    assert cells["ours r=0.3"][7] == f"{median(other['forward_ms']) / median(ours['forward_ms']):.2f}"
    assert cells["published r=0.3"][4] == cells["ours r=0.3"][5] == "1.00"
    assert all(len(line) == len(HEAD) for line in cells.values())


def test_sweeps_and_profiles_run_and_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, profile = tmp_path / "sweep.json", tmp_path / "profile.json"
    main(["sweep", "width", *SMALL, "--json", str(sweep)])
    main(["profile", "text-4k", *SMALL, "--json", str(profile)])
    assert "all of it" in capsys.readouterr().out
    first = json.loads(sweep.read_text())["sweeps"][0]
    assert [point["x"] for point in first["points"]] == [64, 128]
    assert first["crossover_train_ms"] == crossover(first["points"])["crossover_train_ms"]
    (figure,) = draw([sweep, profile], tmp_path)
    drawn = figure.read_bytes()
    assert draw([sweep], tmp_path) == [figure]
    assert figure.read_bytes() == drawn
    groups = {group["group"]: group for group in json.loads(profile.read_text())["profiles"][0]["groups"]}
    assert groups["EMA"]["ms"] > 0
    assert groups["projections"]["floor_ms"] > 0


def test_the_page_shows_the_latest_at_full_size(record: dict[str, Any], tmp_path: Path) -> None:
    assert pages.workloads(tmp_path) == pages.sweeps(tmp_path) == pages.profiles(tmp_path) == pages.NOTHING
    (tmp_path / "small.json").write_text(json.dumps(record))
    assert pages.workloads(tmp_path) == pages.NOTHING
    for name, date, times in (("a", "2026-02-01", [1.0, 3.0]), ("b", "2026-01-01", [70.0, 80.0])):
        content = record | {"environment": record["environment"] | {"scale": "full", "date": date}}
        content["rows"] = [row | {"train_ms": times} if row["train_ms"] else row for row in record["rows"]]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "cpu-lm.md").write_text("The rest goes into sorting.")
    page = pages.workloads(tmp_path)
    assert "1.00..3.00" in page
    assert "70.0..80.0" not in page
    assert "The rest goes into sorting." in page.split("### cpu-lm")[1]
    assert "Remarks: ours r=0.15, graph: not available: " in page


def test_the_page_shows_an_earlier_record_with_other_models(record: dict[str, Any], tmp_path: Path) -> None:
    renamed = {"text-4k": {"published r=0.15": "another r=0.15"}}
    for name, date in (("a", "2026-02-01"), ("b", "2026-01-01")):
        content = record | {"environment": record["environment"] | {"scale": "full", "date": date}}
        if name == "b":
            content["rows"] = [
                row | {"model": renamed.get(row["workload"], {}).get(row["model"], row["model"])}
                for row in record["rows"]
            ]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    page = pages.workloads(tmp_path)
    assert page.index("published r=0.15") < page.index("another r=0.15")
    tables = {name: text.count("| model |") for name, _, text in (part.partition("\n") for part in page.split("### "))}
    assert tables.pop("text-4k") == 2
    assert set(tables.values()) == {0, 1}, "0 is what stands in front of the first"


def test_the_page_shows_servers(tmp_path: Path) -> None:
    assert pages.serving(tmp_path) == pages.NOTHING
    times = {"first_token_ms": [10.0, 20.0], "next_token_ms": [1.0, 2.0], "whole_s": [3.25, 4.5]}
    rows = [
        {"server": name, "clients": clients, "tokens": 7, "requests_per_s": 2.0, "tokens_per_s": 14.0, **times}
        for name in ("here", "there")
        for clients in (3, 12)
    ]
    here = {"server": "here", "version": "1", "model": "m", "parameters": 1234, "slots": 2, "how": "in its way"}
    there = {**here, "server": "there", "attention": "flash", "tokens_a_step": 2048, "cuda_graphs": True}
    there |= {"asynchronous": True, "failed": ["best: it has none"]}
    nowhere = {"server": "nowhere", "failed": ["it is not installed"]}
    about = {"environment": {"device": "this one", "dtype": "float32"}, "prompt_bytes": [1, 5]}
    (tmp_path / "a.json").write_text(json.dumps({**about, "servers": [here, there, nowhere], "rows": rows}))
    page = pages.serving(tmp_path)
    assert page.startswith("Prompts of 1 to 5 bytes, 7 bytes written. this one, float32.")
    assert "- here 1: m, 1,234 parameters, 2 slots, in its way.\n" in page
    settings = "attention flash, at most 2,048 tokens a step, CUDA graphs, the next step prepared meanwhile"
    assert f"- there 1: m, 1,234 parameters, 2 slots, in its way, {settings}.\n" in page
    assert "- there, not measured: best: it has none.\n- nowhere, not measured: it is not installed.\n" in page
    numbers = "2.0 | 14 | 10.0 | 20.0 | 1.0 | 2.0 | 3.25 | 4.50 |"
    assert page.endswith("\n".join(f"| {name} | {n} | {numbers}" for n in (3, 12) for name in ("here", "there")))
    assert "| sma serve | 128 |" in pages.serving()
    assert "| Transformers | 128 |" in pages.serving()


def test_what_was_measured_before_is_still_read() -> None:
    assert "### text-4k" in pages.workloads()
    assert "### lm-8k" in pages.workloads()


def test_tokens_without_room_are_reported() -> None:
    config: Any = sma.load_spec("seqboat_text", "d_model=32", "n_layers=2", "blocks[0].activate.capacity=0.1")
    setting = Setting(torch.device("cpu"), torch.float32).of(2, 64)
    ours = Ours(config.build(), 0.9)
    model_subject(ours, BYTES, setting, ours.settle)
    assert ours.overflow == 2 * (128 - 13)  # in each layer as many as are not among the first 13 of the batch
    row = {"model": "ours", "overflow": ours.overflow}
    assert remarks([row, {"model": "other", "overflow": 0}]) == ["ours: 230 tokens dropped for lack of capacity"]


def test_rows_are_chosen_by_words(tmp_path: Path) -> None:
    main(["cpu-lm", "--rows", "r=0.3", "--without", "published,flash", *SMALL, "--json", str(tmp_path / "run.json")])
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["ours r=0.3"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SystemExit, match="nothing is named text-5k; there are text-4k, "):
        main(["run", "text-5k", *SMALL])


def test_each_workload_names_rows_that_it_has() -> None:
    for name, workload in WORKLOADS.items():
        labels = [row.label for row in workload.rows]
        assert len(set(labels)) == len(labels), name
        assert workload.ours in labels, name
        assert workload.peer in labels, name


def test_the_published_layer_gets_the_sizes_of_the_spec() -> None:
    options = peers.published_options(load("seqboat_lm", Setting(torch.device("cpu"), torch.float32)), LM, 8192)
    assert (options["embed_dim"], options["zdim"], options["hdim"], options["window_size"]) == (616, 128, 1232, 1024)
    assert (options["rel_pos_bias"], options["max_positions"], options["bidirectional"]) == ("rotary", 8192, False)


def test_a_kernel_belongs_to_what_launched_it() -> None:
    def event(name: str, parent: Any = None, kernels: tuple[Any, ...] = (), device: str = "CPU") -> SimpleNamespace:
        taken = SimpleNamespace(elapsed_us=lambda: 5.0)
        return SimpleNamespace(
            name=name,
            cpu_parent=parent,
            kernels=kernels,
            device_type=f"DeviceType.{device}",
            time_range=taken,
            is_user_annotation=False,
        )

    kernel = SimpleNamespace(name="forward_kernel", duration=3.0)
    scope = event("_CombineBackward")
    launch = event("sma::combine::forward_kernel", scope, (kernel,))
    on_device = [event("forward_kernel", device="CUDA"), event("gemm", device="CUDA")]
    found = list(spent([scope, launch, *on_device], on_gpu=True))
    # What no launch is known for, 5 - 3 microseconds of the first kernel and all of the second, is there all the same.
    assert found == [
        ("forward_kernel", ["sma::combine::forward_kernel", "_CombineBackward"], 3.0),
        ("forward_kernel", [], 2.0),
        ("gemm", [], 5.0),
    ]
    assert [group_of(name, path) for name, path, _ in found] == ["merge", "other", "projections"]
    assert group_of("gemm", ["aten::mm", "sma::ema"]) == "EMA"
    assert group_of("nothing", ["aten::fft"]) == "EMA"


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("_ema_forward_kernel", "EMA"),
        ("window_attention_backward", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTT", "projections"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>", "optimiser"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "element by element"),
        ("something_else", "other"),
    ],
)
def test_kernels_are_told_by_their_names(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_the_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    limits = Ceilings(bandwidth=1e12, arithmetic=1e14)
    assert limits.floor_ms(Work(moved=2e9, operations=1e11)) == 2.0
    assert limits.floor_ms(Work(moved=1e9, operations=4e11)) == 4.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_captured_training_step_is_replayed() -> None:
    setting = Setting(torch.device("cuda"), torch.bfloat16).of(2, 64)
    subject = model_subject(peers.transformer(LM, 2, 64, 2, 128), LM, setting, graph=True)
    assert subject.train is not None
    assert (subject.peak or 0) > 0
    weight = next(subject.module.parameters())
    assert weight.grad is not None
    weight.grad.fill_(7.0)
    subject.train()
    assert not bool((weight.grad == 7.0).any())
    subject.module.eval()
    subject.forward()
    subject.forward()


def test_a_stream_is_read_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stream.json"
    main(["stream", *SMALL, "--json", str(path)])
    assert "state MiB" in capsys.readouterr().out
    record = json.loads(path.read_text())
    points = record["streams"][0]["points"]
    assert [point["tokens"] for point in points] == [125, 250, 625, 1000]
    assert len({point["state_mib"] for point in points}) == 1
    assert all(len(point["step_ms"]) == 2 and min(point["step_ms"]) > 0 for point in points)
    assert draw([path], tmp_path) == [tmp_path / "speed_stream.svg"]
    assert pages.streams(tmp_path) == pages.NOTHING  # it was not at full size
    record["environment"]["scale"] = "full"
    path.write_text(json.dumps(record))
    assert "| 1,000 |" in pages.streams(tmp_path)
    with pytest.raises(SystemExit, match="as long as a number says, got ten"):
        main(["stream", "ten", *SMALL])


def test_one_text_is_read_in_every_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import exactness

    monkeypatch.setattr(exactness, "GREEDY", 8)
    monkeypatch.setattr(exactness, "CHUNK", 32)
    save(tiny("seqboat_small_lm", vocab_size=256, tie_embeddings=False), tmp_path / "model.safetensors")
    (tmp_path / "text").write_bytes(Path(__file__).read_bytes()[:200])
    path, options = tmp_path / "exact.json", ["--device", "cpu", "--tokens", "150", "--text", str(tmp_path / "text")]
    main(["exact", str(tmp_path / "model.safetensors"), *options, "--dtype", "float64", "--json", str(path)])
    assert "greedy after" in capsys.readouterr().out
    (result,) = json.loads(path.read_text())["exactness"]
    ways = {row["way"]: row for row in result["rows"]}
    assert set(ways) == {
        "in chunks of 32",
        "in chunks of 1 to 64",
        "decoder, launched",
        "Transformers, 32 at a time",
        "Transformers, token by token",
        "served, log-probabilities",
    }
    assert all(0 < row["logits"] < 1e-10 and row["relative"] <= row["logits"] for row in ways.values())
    assert all(row["decisions"] == 0 for way, row in ways.items() if not way.startswith(("served", "Transf")))
    assert [point["after"] for point in result["greedy"]] == [150]
    assert set(result["greedy"][0]["same"].values()) == {8}
    assert "| decoder, launched |" in pages.exactness(tmp_path)
    with pytest.raises(ValueError, match="at most the 200 bytes of the text, got 1000"):
        main(["exact", str(tmp_path / "model.safetensors"), *options, "--tokens", "1000"])


def test_a_way_that_is_wrong_is_seen() -> None:
    from benchmarks.exactness import Passed, _along, _difference, _same

    whole = Passed(torch.tensor([[4.0, -8.0], [0.5, 1.0]]), {"layer": torch.tensor([[True], [False]])})
    other = Passed(torch.tensor([[4.0, -10.0], [0.5, 2.0]]), {"layer": torch.tensor([[True], [True]])})
    assert _difference(other, whole) == {"logits": 2.0, "along": [], "relative": 1.0, "decisions": 1}
    assert _along(torch.arange(2000.0)) == [999.0]
    assert (_same([1, 2, 3], [1, 2, 4]), _same([1, 2], [1, 2])) == (2, 2)
