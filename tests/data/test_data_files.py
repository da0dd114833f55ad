"""Readers of text, images, speech, pairs of documents and Pathfinder: what they give, and what they refuse."""

from __future__ import annotations

import builtins
import gzip
import struct
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sma.errors import ConfigError, DataError, MissingExtraError
from sma_models.training.data import image, pathfinder, retrieval, speech, text
from sma_models.training.data.datasets import BYTE_PAD


def test_reviews_become_bytes(reviews: Path) -> None:
    splits = text.load(reviews, max_length=14, validation_fraction=0.25)
    assert (len(splits.train), len(splits.validation or []), len(splits.test)) == (15, 5, 20)
    assert splits.test.class_counts().tolist() == [10, 10]
    assert splits.test.document(3) == "neg/3_3.txt"
    item = splits.test[12]
    assert item["label"] == 1
    assert bytes(item["tokens"].tolist()) == "test pos éé".encode()[:14]
    assert len(splits.test[19]["tokens"]) == 14
    batch = splits.test.collate([splits.test[10], item])
    assert batch["tokens"] is not None
    assert batch["valid"] is not None
    assert batch["tokens"][0, 9:].tolist() == [BYTE_PAD] * 4
    assert batch["valid"].sum(1).tolist() == [9, 13]
    assert splits.test.vocab_size == 257


def test_the_validation_split_is_a_partition_that_the_seed_decides(reviews: Path) -> None:
    def parts(seed: int) -> tuple[set[str], set[str]]:
        splits = text.load(reviews, validation_fraction=0.3, seed=seed)
        assert splits.validation is not None
        train = {splits.train.document(i) for i in range(len(splits.train))}
        return train, {splits.validation.document(i) for i in range(len(splits.validation))}

    train, validation = parts(0)
    assert not train & validation
    assert len(train | validation) == 20
    assert parts(0) == (train, validation)
    assert parts(1)[1] != validation
    assert text.load(reviews, validation_fraction=0.0).validation is None


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 0.001])
def test_a_fraction_that_leaves_an_empty_side_is_refused(reviews: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match="validation_fraction"):
        text.load(reviews, validation_fraction=fraction)


def test_bad_reviews_are_refused(reviews: Path) -> None:
    place = reviews / "aclImdb/train/pos/3_3.txt"
    place.write_bytes(b"")
    with pytest.raises(DataError, match=r"3_3\.txt: must hold data, got an empty file"):
        text.load(reviews)
    place.write_bytes("né".encode("latin-1"))
    with pytest.raises(DataError, match=r"3_3\.txt: must be text in UTF-8, got byte 0xe9 at 1"):
        text.load(reviews)
    for file in (reviews / "aclImdb/train/pos").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"pos: must contain \*\.txt files, got none"):
        text.load(reviews)
    (reviews / "aclImdb/train/pos").rmdir()
    with pytest.raises(DataError, match="pos: must be a readable folder"):
        text.load(reviews)
    with pytest.raises(ConfigError, match="max_length"):
        text.load(reviews, max_length=0)


def test_luma_is_that_of_pillow() -> None:
    pillow = pytest.importorskip("PIL.Image", reason="compares with Pillow")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = np.asarray(pillow.fromarray(pixels).convert("L"))
    found = image.luma(pixels.reshape(-1, 3).T[None])[0].reshape(64, 64)
    assert (found == expected).all()


def test_luma_of_pure_colours() -> None:
    colours = np.array([[255, 0, 0, 255, 0], [0, 255, 0, 255, 0], [0, 0, 255, 255, 0]], dtype=np.uint8)
    assert image.luma(colours).tolist() == [76, 150, 29, 255, 0]


def test_cifar10_becomes_grey_rows(cifar: Path) -> None:
    splits = image.load_cifar10(cifar, rows=20, validation_fraction=0.1)
    assert (len(splits.train), len(splits.validation or []), len(splits.test)) == (90, 10, 20)
    row = np.frombuffer((cifar / "cifar-10-batches-bin/test_batch.bin").read_bytes(), np.uint8)[3073 : 2 * 3073]
    red, green, blue = row[1:].astype(np.float64).reshape(3, 1024)
    grey = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
    item = splits.test[1]
    assert item["label"] == row[0]
    assert item["values"].dtype == torch.float32
    assert item["values"].shape == (1024,)
    np.testing.assert_allclose(item["values"].numpy() * 0.24 + 0.48, grey, atol=0.51 / 255)
    batch = splits.test.collate([splits.test[i] for i in range(3)])
    assert batch["values"] is not None
    assert batch["values"].shape == (3, 1024)
    assert batch["valid"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "must hold data, got an empty file"),
        (lambda content: content[:-1], "the size must be a multiple of 3073 bytes .* got 61459 bytes"),
        (lambda content: content[:-3073], "must hold 20 rows of 3073 bytes, got 19 rows"),
        (lambda content: content[:3073] + b"\x0a" + content[3074:], "row 1: the label must be below 10, got 10"),
    ],
)
def test_bad_cifar10_files_are_refused(cifar: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = cifar / "cifar-10-batches-bin/data_batch_3.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=rf"data_batch_3\.bin: {message}"):
        image.load_cifar10(cifar, rows=20)


def test_the_release_has_ten_thousand_rows_a_file(cifar: Path) -> None:
    with pytest.raises(DataError, match="must hold 10000 rows"):
        image.load_cifar10(cifar)
    (cifar / "cifar-10-batches-bin/test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin: must be a readable file, got No such file"):
        image.load_cifar10(cifar, rows=20)


def idx(*shape: int, content: bytes | None = None, kind: int = 8) -> bytes:
    body = bytes(index % 10 for index in range(int(np.prod(shape)))) if content is None else content
    return struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape) + body


def write_idx(folder: Path, **replace: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train-images-idx3": idx(20, 4, 4), "train-labels-idx1": idx(20)}
    files |= {"t10k-images-idx3": idx(10, 4, 4), "t10k-labels-idx1": idx(10)}
    for name, content in {**files, **{key.replace("_", "-"): value for key, value in replace.items()}}.items():
        (folder / f"{name}-ubyte").write_bytes(content)


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_read_plain_and_compressed(tmp_path: Path, compressed: bool) -> None:
    write_idx(tmp_path / "mnist")
    if compressed:
        for path in sorted((tmp_path / "mnist").iterdir()):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    splits = image.load_idx(tmp_path, mean=0.5, std=0.25)
    assert (len(splits.train), len(splits.validation or []), len(splits.test)) == (18, 2, 10)
    assert splits.max_length == 16
    assert splits.test[3]["label"] == 3
    expected = (torch.arange(48, 64) % 10 / 255 - 0.5) / 0.25
    torch.testing.assert_close(splits.test[3]["values"], expected)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    # mtime=0: with the time of day in it, every worker of pytest-xdist would collect another name.
    [
        ("train_images_idx3", b"", "must hold data"),
        ("train_images_idx3", b"PNG", "must begin with 00 00 08 03 .* got 50 4e 47"),
        ("train_images_idx3", idx(20, 4, 4, kind=13), "must begin with 00 00 08 03 .* got 00 00 0d 03"),
        ("train_images_idx3", idx(20), "must begin with 00 00 08 03 .* got 00 00 08 01"),
        ("train_images_idx3", idx(20, 4, 4)[:9], "must state 3 sizes, got 5 bytes of them"),
        ("train_images_idx3", idx(20, 4, 4)[:-1], "must hold the 320 bytes of shape .* got 319 bytes"),
        ("train_images_idx3", idx(20, 4, 4) + b"x", "must hold the 320 bytes of shape .* got more"),
        ("train_images_idx3", idx(2**31, 2**16, 2**16, content=b"x"), "must hold the .* got 1 bytes"),
        ("train_images_idx3", idx(0, 4, 4), "must hold data, got shape"),
        ("train_images_idx3", gzip.compress(idx(20, 4, 4), mtime=0)[:-9], "must be a whole gzip file"),
        ("train_images_idx3", gzip.compress(idx(20, 4, 4), mtime=0)[:-4] + b"1234", "must be a whole gzip file"),
        ("train_labels_idx1", idx(19), "must have a label for each of the 20 images, got 19 labels"),
        ("train_labels_idx1", idx(20, content=bytes(19) + b"\x0b"), "row 19: the label must be below 10, got 11"),
        ("t10k_images_idx3", idx(10, 5, 4), "test images must have 16 pixels .* got 20"),
    ],
)
def test_bad_idx_files_are_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    write_idx(tmp_path, **{file: content})
    with pytest.raises(DataError, match=message):
        image.load_idx(tmp_path)


def test_missing_idx_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must contain train-images-idx3-ubyte or the same with"):
        image.load_idx(tmp_path)


def test_recordings_have_one_length(speech_root: Path) -> None:
    splits = speech.load(speech_root.parent)
    assert splits.classes == ("no", "yes")
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 2, 2)
    assert splits.train.class_counts().tolist() == [4, 4]
    items = [splits.train[i] for i in range(8)]
    assert all(item["values"].shape == (16000,) and item["values"].dtype == torch.float32 for item in items)
    assert all(float(item["values"].min()) >= -1.0 and float(item["values"].max()) < 1.0 for item in items)
    with wave.open(str(speech_root / "no/2.wav")) as file:
        raw = np.frombuffer(file.readframes(12000), "<i2") / 32768
    short = items[0]["values"].numpy()
    np.testing.assert_array_equal(short[:12000], raw.astype(np.float32))
    assert not short[12000:].any()


def test_some_classes_can_be_chosen(speech_root: Path, wav: Callable[..., None]) -> None:
    wav(speech_root / "maybe/0.wav")
    splits = speech.load(speech_root, classes=("yes", "no"), length=100)
    assert splits.classes == ("yes", "no")
    assert splits.train[0]["label"] == 0
    assert splits.train[0]["values"].shape == (100,)
    with pytest.raises(ConfigError, match="classes: must name each class once"):
        speech.load(speech_root, classes=("yes", "yes"))
    with pytest.raises(DataError, match=r"must contain a folder for each of classes .*maybe, no, yes.*got no perhaps"):
        speech.load(speech_root, classes=("perhaps",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 8000}, "must have 16000 Hz, 16 bit, 1 channel, got 8000 Hz, 16 bit, 1 channel"),
        ({"width": 1}, "got 16000 Hz, 8 bit, 1 channel"),
        ({"channels": 2}, "got 16000 Hz, 16 bit, 2 channel"),
        ({"samples": 0}, "must hold samples, got none"),
    ],
)
def test_other_kinds_of_recordings_are_refused(
    speech_root: Path, wav: Callable[..., None], options: dict[str, Any], message: str
) -> None:
    wav(speech_root / "yes/4.wav", **options)
    with pytest.raises(DataError, match=rf"4\.wav: .*{message}"):
        speech.load(speech_root)


def test_broken_recordings_are_refused(speech_root: Path) -> None:
    path = speech_root / "yes/4.wav"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-2], "must hold the 16000 samples that its header states"),
        (whole[:20], "must be an uncompressed WAV file"),
        (b"", "must be an uncompressed WAV file, got a file that ends too early"),
        (b"ID3" + whole[3:], "must be an uncompressed WAV file"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"4\.wav: {message}"):
            speech.load(speech_root)
    splits = speech.load(speech_root, check=False)
    with pytest.raises(DataError, match=r"4\.wav"):
        [splits.train[i] for i in range(len(splits.train))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"validation_list\.txt: must hold data"),
        ("no/0.wav\nno/9.wav\n", r"validation_list\.txt: must list files that exist, got no/9\.wav"),
        ("no/0.wav\nno/1.wav\n", r"testing_list\.txt: line 1: a file must be listed once, got no/1\.wav"),
        ("0.wav\n", r"validation_list\.txt: line 1: must be <class>/<file>\.wav, got 0\.wav"),
    ],
)
def test_bad_lists_are_refused(speech_root: Path, content: str, message: str) -> None:
    (speech_root / "validation_list.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        speech.load(speech_root)


def pair_line(label: str = "1.0", first: str = "eins", second: str = "zwei") -> str:
    return f"{label}\tA\tB\t{first}\t{second}\n"


def write_pairs(folder: Path) -> None:
    for name in retrieval.FILES.values():
        (folder / name).write_text(pair_line() + pair_line("0.0", "eins", 'dr"ei') + pair_line("0", "lang" * 9))


def test_pairs_share_their_documents(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    splits = retrieval.load(tmp_path, max_length=10)
    assert splits.train.labels.tolist() == [1, 0, 0]
    assert len(splits.train.documents) == 4
    batch = splits.train.collate([splits.train[i] for i in range(3)])
    assert batch["tokens"] is not None
    assert batch["valid"] is not None
    assert batch["tokens"].shape == (3, 2, 10)
    assert bytes(batch["tokens"][1, 1, :5].tolist()) == b'dr"ei'
    assert batch["valid"].sum(-1).tolist() == [[4, 4], [4, 5], [10, 4]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold data"),
        (b"1.0\tA\tB\teins\n", "line 1: must be label, id, id, text, text between tabs, got 4 columns"),
        (pair_line("2.0").encode(), "line 1: the label must be 0 or 1, got 2.0"),
        (pair_line(first="").encode(), "line 1: a document must hold text"),
        (pair_line(first="é").encode("latin-1"), "line 1: must be text in UTF-8, got byte 0xe9"),
    ],
)
def test_bad_pairs_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_pairs(tmp_path)
    (tmp_path / retrieval.FILES["validation"]).write_bytes(content)
    with pytest.raises(DataError, match=rf"new_aan_pairs\.eval\.tsv: {message}"):
        retrieval.load(tmp_path)


@pytest.fixture
def pathfinder_root(tmp_path: Path) -> Path:
    pillow = pytest.importorskip("PIL.Image", reason="reading Pathfinder needs Pillow")
    folder = tmp_path / "pathfinder32/curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for part in range(2):
        (folder / f"imgs/{part}").mkdir(parents=True)
        lines = []
        for number in range(10):
            pillow.new("L", (32, 32), 20 * number).save(folder / f"imgs/{part}/sample_{number}.png")
            lines.append(f"imgs/{part} sample_{number}.png {number} {number % 2} 1.0 14\n")
        (folder / f"metadata/{part}.npy").write_text("".join(lines))
    return tmp_path


def test_pathfinder_images_become_rows(pathfinder_root: Path) -> None:
    splits = pathfinder.load(pathfinder_root)
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 2, 2)
    files = {str(part.files[i]) for part in (splits.train, splits.validation, splits.test) for i in part._index}
    assert len(files) == 20
    for i in range(len(splits.train)):
        item = splits.train[i]
        number = int(str(splits.train.files[splits.train._index[i]]).rpartition("_")[2].removesuffix(".png"))
        assert item["label"] == number % 2
        torch.testing.assert_close(item["values"], torch.full((1024,), (20 * number / 255 - 0.5) / 0.5))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metadata/0.npy", b"", "0.npy: must hold data"),
        ("metadata/0.npy", b"\x93NUMPY\x01\x00\n", "0.npy: must be lines of text"),
        ("metadata/0.npy", b"imgs/0 sample_0.png 0\n", "line 1: must be <folder>"),
        ("metadata/0.npy", b"imgs/0 sample_0.png 0 2 1.0\n", "line 1: must be <folder> .* <label 0 or 1>"),
        ("metadata/0.npy", b"imgs/0 sample_99.png 0 1 1.0\n", "line 1: must name an image that exists, once"),
        ("metadata/0.npy", b"imgs/7 sample_0.png 0 1 1.0\n", "imgs/7: must be a readable folder"),
        ("imgs/0/sample_0.png", b"", "sample_0.png: must be a PNG image"),
        ("imgs/0/sample_0.png", b"no image", "sample_0.png: must be a PNG image"),
    ],
)
def test_bad_pathfinder_files_are_refused(pathfinder_root: Path, file: str, content: bytes, message: str) -> None:
    (pathfinder_root / "pathfinder32/curv_contour_length_14" / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        pathfinder.load(pathfinder_root)


def test_other_sizes_and_broken_images_are_refused(pathfinder_root: Path) -> None:
    path = pathfinder_root / "pathfinder32/curv_contour_length_14/imgs/0/sample_0.png"
    with pytest.raises(DataError, match=r"must be 128 x 128 pixels, got 32 x 32"):
        pathfinder.read_png(path, 128)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"sample_0\.png: must be a (whole )?PNG image"):
        pathfinder.read_png(path, 32)
    with pytest.raises(ConfigError, match="difficulty: must be one of"):
        pathfinder.load(pathfinder_root, difficulty="hard")


def test_without_pillow_one_error_says_so(pathfinder_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_pillow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "PIL":
            raise ImportError("No module named 'PIL'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(MissingExtraError, match="needs Pillow"):
        pathfinder.load(pathfinder_root)


def test_readers_never_write(reviews: Path) -> None:
    before = sorted(path.name for path in reviews.rglob("*"))
    text.load(reviews)
    assert sorted(path.name for path in reviews.rglob("*")) == before
