"""Every recipe parses, writes itself out, builds, and trains on data in the official layout."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sma.errors import SMAError, SpecError
from sma.spec import load_as, loads
from sma_models.training.data import enwik8, listops
from sma_models.training.loop import Outcome
from sma_models.training.recipe import Recipe, load_recipe, recipe_names, recipe_yaml
from sma_models.training.run import Run

Runner = Callable[..., tuple[Run, Outcome]]
TWO_STEPS = (
    "optimiser.warmup=1",
    "train.steps=2",
    "train.batch_size=2",
    "train.accumulate=1",
    "train.log_every=1",
    "train.device=cpu",
    "model.n_layers=1",
    "model.d_model=16",
)


def test_there_is_a_recipe_for_every_task() -> None:
    wanted = {"enwik8", "image", "listops", "lm", "lm_stdlib", "pathfinder", "pathx", "retrieval", "speech", "text"}
    assert wanted <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_written_out_recipe_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    file = tmp_path / "config.yaml"
    file.write_text(recipe_yaml(recipe))
    assert load_as(file, Recipe) == recipe


@pytest.mark.parametrize(
    ("name", "lr", "decay", "batch", "steps", "warmup"),
    [
        ("listops", 0.004, 0.001, 64, 90_000, 27_000),
        ("text", 0.004, 0.01, 50, 25_000, 10_000),
        ("retrieval", 0.003, 0.04, 64, 91_960, 10_000),
        ("image", 0.01, 0.02, 50, 180_000, 9_000),
        ("pathfinder", 0.01, 0.01, 128, 250_000, 50_000),
        ("pathx", 0.01, 0.01, 16, 125_000, 25_000),
        ("speech", 0.01, 0.01, 20, 250_000, 10_000),
        ("enwik8", 0.005, 0.1, 8, 400_000, 24_000),
    ],
)
def test_published_hyperparameters(name: str, lr: float, decay: float, batch: int, steps: int, warmup: int) -> None:
    recipe = load_recipe(name)
    assert (recipe.optimiser.lr, recipe.optimiser.weight_decay) == (lr, decay)
    assert (recipe.train.batch_size, recipe.train.steps, recipe.optimiser.warmup) == (batch, steps, warmup)
    assert recipe.optimiser.betas == (0.9, 0.98)


def check(run: Run, outcome: Outcome, quality: str) -> None:
    assert outcome.summary is not None
    assert outcome.step == 2
    assert outcome.summary["test"][quality] >= 0
    assert len(run.metrics.read_text().splitlines()) == 3
    assert run.weights.is_file()
    assert run.model().training is False


def test_text(reviews: Path, run_recipe: Runner) -> None:
    check(*run_recipe("text", *TWO_STEPS, f"data.root={reviews}", "data.max_length=40"), "accuracy")


def test_image(cifar: Path, run_recipe: Runner) -> None:
    check(*run_recipe("image", *TWO_STEPS, f"data.root={cifar}", "data.rows=null"), "accuracy")


def test_image_from_idx_files(tmp_path: Path, run_recipe: Runner) -> None:
    root = tmp_path / "mnist"
    root.mkdir()
    for part, count in (("train", 20), ("t10k", 6)):
        pixels = np.random.default_rng(0).integers(0, 256, count * 64, dtype=np.uint8)
        (root / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4B3I", 0, 0, 8, 3, count, 8, 8) + pixels.tobytes()
        )
        (root / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(range(count))[:count]
        )
    labels = root / "train-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 20) + bytes(n % 10 for n in range(20)))
    check(*run_recipe("image", *TWO_STEPS, "data.type=idx", f"data.root={root}"), "accuracy")


def test_speech(speech_root: Path, run_recipe: Runner) -> None:
    changes = (f"data.root={speech_root}", "data.classes=[no,yes]", "data.length=400", "model.n_classes=2")
    check(*run_recipe("speech", *TWO_STEPS, *changes), "accuracy")


def test_listops_from_official_files(tmp_path: Path, run_recipe: Runner) -> None:
    small = listops.Distribution(min_length=5, max_length=40, max_depth=3)
    listops.write(tmp_path / "lo", listops.generate({"train": 8, "validation": 4, "test": 4}, distribution=small))
    check(*run_recipe("listops", *TWO_STEPS, f"data.root={tmp_path / 'lo'}"), "accuracy")


def test_listops_generated_once(tmp_path: Path, run_recipe: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMA_CACHE", str(tmp_path / "cache"))
    sizes = (
        "data.train=8",
        "data.validation=4",
        "data.test=4",
        "data.min_length=5",
        "data.max_length=40",
        "data.max_depth=3",
    )
    check(*run_recipe("listops", *TWO_STEPS, *sizes), "accuracy")
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.tsv")}
    assert len(made) == 3
    run_recipe("listops", *TWO_STEPS, *sizes, name="again")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.tsv")} == made


def test_retrieval(tmp_path: Path, run_recipe: Runner) -> None:
    rows = "".join(f"{n % 2}.0\t{n}\t{n + 1}\tpaper number {n}\tanother {'x' * n}\n" for n in range(6))
    for part in ("train", "eval", "test"):
        (tmp_path / f"new_aan_pairs.{part}.tsv").write_text(rows)
    run, outcome = run_recipe("retrieval", *TWO_STEPS, f"data.root={tmp_path}")
    check(run, outcome, "accuracy")
    assert any(column.startswith("rate/second.layers.0") for column in run.metrics.read_text().split(","))


@pytest.mark.parametrize(("name", "resolution"), [("pathfinder", 32), ("pathx", 128)])
def test_pathfinder(name: str, resolution: int, tmp_path: Path, run_recipe: Runner) -> None:
    image = pytest.importorskip("PIL.Image", reason="reading PNG files needs Pillow")
    folder = tmp_path / f"pathfinder{resolution}" / "curv_contour_length_14"
    (folder / "imgs" / "0").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for n in range(10):
        image.new("L", (resolution, resolution), 20 * n).save(folder / "imgs" / "0" / f"sample_{n}.png")
    lines = "".join(f"imgs/0 sample_{n}.png {n} {n % 2} 0 1 2\n" for n in range(10))
    (folder / "metadata" / "0.npy").write_text(lines)
    small = ("model.blocks[0].mixer.truncation=64", "model.blocks[0].activate.module.window=16")
    check(*run_recipe(name, *TWO_STEPS, *small, f"data.root={tmp_path}"), "accuracy")


def test_lm_of_any_files(tmp_path: Path, run_recipe: Runner) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question\n" * 40)
    check(*run_recipe("lm", *TWO_STEPS, f"data.root={tmp_path / 'a.txt'}", "data.seq_len=32"), "bits_per_byte")


def test_lm_stdlib(tmp_path: Path, run_recipe: Runner) -> None:
    library = tmp_path / "lib"
    library.mkdir()
    for n in range(40):
        (library / f"module_{n}.py").write_text(f"def f_{n}(x):\n    return x + {n}\n" * 5)
    changes = (f"data.root={library}", "data.seq_len=32", "data.fractions=[0.2,0.2]")
    check(*run_recipe("lm_stdlib", *TWO_STEPS, *changes), "bits_per_byte")


def test_enwik8_layout(tmp_path: Path, run_recipe: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enwik8, "SIZES", (900, 50, 50))
    (tmp_path / "enwik8").write_bytes(b"<mediawiki>" * 90 + b"0123456789")
    check(*run_recipe("enwik8", *TWO_STEPS, f"data.root={tmp_path}", "data.seq_len=32"), "bits_per_byte")


def test_state_carried_through_an_evaluation(tiny: str, run_recipe: Runner) -> None:
    """With the state carried on, the predictions of the model do not depend on how the stream is cut."""
    results = []
    for length in (16, 48):
        changes = ("data.carry_state=true", f"data.eval_seq_len={length}", "train.steps=6")
        _, outcome = run_recipe(tiny, *changes, name=f"cut-{length}")
        assert outcome.summary is not None
        results.append(outcome.summary["test"]["loss"])
    assert results[0] == pytest.approx(results[1], abs=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layers=3", "unknown key 'layers'; did you mean 'n_layers'"),
        ("data.type=imagenet", "no data named 'imagenet'"),
        ("data.seqlen=4", "unknown key 'seqlen'; did you mean 'seq_len'"),
        ("train.steps=0", "steps: must be at least 1, got 0"),
        ("train.steps=many", "train.steps: expected int"),
        ("train.accumulate=3", "accumulate: must divide batch_size = 4, got 3"),
        ("optimiser.warmup=30", "optimiser.warmup: must be below train.steps = 30, got 30"),
        ("optimiser.algorithm=sgd", "optimiser.algorithm: expected one of 'adamw', 'radam', 'adam'"),
        ("train.precision=float8", "train.precision: expected one of"),
        ("model=seqboat", "model"),
    ],
)
def test_a_bad_override_is_one_clear_error(tiny: str, override: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_recipe(tiny, override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.vocab_size=200", "model.vocab_size: must be at least 256 for these data, got 200"),
        ("model=seqboat_text", "model: must be a LanguageModel for data of the kind 'lm', got Classifier"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(
    tiny: str, change: str, message: str, run_recipe: Runner
) -> None:
    with pytest.raises(SMAError) as caught:
        run_recipe(tiny, change)
    assert message in str(caught.value)


def test_a_recipe_is_not_a_model() -> None:
    with pytest.raises(SpecError):
        loads(recipe_yaml(load_recipe("lm")))
