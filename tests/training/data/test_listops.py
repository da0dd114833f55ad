"""ListOps: the distribution, the writing, the values."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from sma.errors import ConfigError, DataError
from sma_models.training.data import listops
from sma_models.training.data.listops_trees import grow
from sma_models.training.data.randomness import LISTOPS, Draws
from sma_models.training.data.testing import Broken, DataSuite

SMALL = listops.Distribution(max_depth=5, max_arguments=4, min_length=5, max_length=60, operator_probability=0.4)
SIZES = {"train": 60, "validation": 15, "test": 20}


class TestListOps(DataSuite):
    config = listops.ListOpsData.Config(max_length=60)
    refused = (("pad_to", 0), ("train", 0), ("seed", -1))
    broken = (
        Broken("basic_train.tsv", b"[MAX 1 2 ]\t2\n", "line 1: must be the header .*, got .MAX 1 2"),
        Broken("basic_val.tsv", b"Source\tTarget\n[MAX 1 2 ]\t12\n", "line 2: the target must be a digit .*, got 12"),
        Broken("basic_test.tsv", b"Source\tTarget\n[MAX 1 2\t2\n", "every bracket must be closed, .*, got .MAX 1 2"),
    )

    def write(self, root: Path) -> None:
        listops.write(root, listops.generate(SIZES, distribution=SMALL))


def tokens_of(text: str) -> bytes:
    return listops.parse(text.encode())


def value_by_recursion(text: str) -> int:
    """A second evaluator that shares nothing with the library's."""
    words = text.replace("(", " ").replace(")", " ").split()

    def read(at: int) -> tuple[int, int]:
        word = words[at]
        if word.isdigit():
            return int(word), at + 1
        arguments, at = [], at + 1
        while words[at] != "]":
            value, at = read(at)
            arguments.append(value)
        arguments.sort()
        middle = len(arguments) / 2
        median = (arguments[int(middle - 0.5)] + arguments[int(middle)]) // 2
        named = {"[MIN": arguments[0], "[MAX": arguments[-1], "[SM": sum(arguments) % 10, "[MED": median}
        return named[word], at + 1

    value, end = read(0)
    assert end == len(words)
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MED 1 2 ]", 1),
        ("[MED 9 1 4 ]", 4),
        ("[MED 1 4 7 8 ]", 5),
        ("[SM 9 9 9 ]", 7),
        ("( ( ( [MAX 2 ) 9 ) ] )", 9),
        ("( ( ( [SM ( ( ( [MIN 3 ) 8 ) ] ) ) 9 ) ] )", 2),
    ],
)
def test_values_of_known_expressions(text: str, value: int) -> None:
    assert listops.evaluate(tokens_of(text)) == value
    assert value_by_recursion(text) == value


def test_writing_follows_the_official_release() -> None:
    assert listops.to_source(tokens_of("[MAX 2 9 [MIN 4 7 ] 0 ]")) == (
        "( ( ( ( ( [MAX 2 ) 9 ) ( ( ( [MIN 4 ) 7 ) ] ) ) 0 ) ] )"
    )
    assert listops.to_source(tokens_of("( ( ( [MAX 2 ) 9 ) ] )"), parentheses=False) == "[MAX 2 9 ]"


@pytest.mark.parametrize("text", ["", "[MAX 2", "2 ]", "[MAX ]", "1 2", "[MIN 1 ] [MAX 2 ]"])
def test_evaluation_refuses_what_is_no_expression(text: str) -> None:
    with pytest.raises(DataError, match="expression"):
        listops.evaluate(tokens_of(text))


def test_samples_have_their_values_and_lengths() -> None:
    splits = listops.generate({"train": 60, "validation": 0, "test": 0}, seed=3)
    assert len(splits["train"]) == 60
    for tokens, value in splits["train"]:
        assert 500 < len(tokens) < 2000
        assert listops.evaluate(tokens) == value == value_by_recursion(listops.to_source(tokens))


def depth_of(tokens: bytes) -> int:
    depth = deepest = 0
    for token in tokens:
        depth += (10 <= token < listops.CLOSE) - (token == listops.CLOSE)
        deepest = max(deepest, depth)
    return deepest


def test_published_limits_hold() -> None:
    samples = [tokens for tokens, _ in listops.generate({"train": 100, "validation": 0, "test": 0})["train"]]
    # Depth 10 is the last level, of digits only: nine operators can be nested, and in 100 long samples some are.
    assert max(map(depth_of, samples)) == 9
    counts: Counter[int] = Counter()
    for tokens in samples:
        stack = [0]
        for token in tokens:
            if token == listops.CLOSE:
                counts[stack.pop()] += 1
                stack[-1] += 1
            elif token >= 10:
                stack.append(0)
            else:
                stack[-1] += 1
    assert set(counts) == set(range(2, 11))
    share = counts[2] / counts.total()
    assert abs(share - 1 / 9) < 0.02
    kinds = Counter(token for tokens in samples for token in tokens if 10 <= token < listops.CLOSE)
    assert all(abs(kinds[kind] / kinds.total() - 0.25) < 0.02 for kind in range(10, 14))


def length_by_recursion(rng: random.Random, depth: int = 1) -> int:
    if depth == 10 or rng.random() >= 0.25:
        return 1
    return 2 + sum(length_by_recursion(rng, depth + 1) for _ in range(rng.randint(2, 10)))


def test_lengths_are_distributed_as_those_of_trees_drawn_one_by_one() -> None:
    rng = random.Random(0)
    one_by_one = [length for length in (length_by_recursion(rng) for _ in range(8000)) if length < 2000]
    at_once = [len(tokens) for tokens, _ in grow(Draws(1, LISTOPS), 8000, 0.25, 10, 10, 2000)]
    for low, high in ((1, 2), (2, 50), (50, 500), (500, 2000)):
        expected, found = (sum(low <= length < high for length in lengths) / 8000 for lengths in (one_by_one, at_once))
        assert abs(expected - found) < 0.02  # four standard errors of the widest bin


def test_the_seed_decides_and_splits_do_not_meet() -> None:
    first, again = (listops.generate(SIZES, seed=1, distribution=SMALL) for _ in range(2))
    other = listops.generate(SIZES, seed=2, distribution=SMALL)
    assert first == again
    assert first["train"] != other["train"]
    everything = [tokens for samples in first.values() for tokens, _ in samples]
    assert len(set(everything)) == len(everything) == 95
    larger = listops.generate({**SIZES, "train": 200}, seed=1, distribution=SMALL)
    assert larger["test"] == first["test"]
    assert larger["validation"] == first["validation"]


def test_the_stream_of_samples_never_changes() -> None:
    """Published figures name a seed; these values keep it meaning the same samples."""
    tokens, value = listops.generate({"train": 1, "validation": 0, "test": 0}, distribution=SMALL)["train"][0]
    assert (listops.to_text(tokens), value) == EXPECTED


EXPECTED = ("[MAX [MIN 9 2 9 ] 3 4 [MIN [MED 5 [MED 0 8 0 2 ] ] 7 [MAX 9 [SM 0 8 1 7 ] 0 1 ] 9 ] ]", 4)


def test_written_files_come_back(tmp_path: Path) -> None:
    splits = listops.generate(SIZES, distribution=SMALL)
    listops.write(tmp_path / "listops-1000", splits)
    loaded = listops.load(tmp_path, max_length=60)
    for name, part in (("train", loaded.train), ("validation", loaded.validation), ("test", loaded.test)):
        assert part is not None
        assert [(part.rows.row(i).tobytes(), int(part.labels[i])) for i in range(len(part))] == splits[name]
        assert all(listops.evaluate(part[i]["tokens"].tolist()) == part[i]["label"] for i in range(len(part)))
    assert not list(tmp_path.rglob(".*"))
    batch = loaded.train.collate([loaded.train[i] for i in range(4)])
    assert batch["tokens"] is not None
    assert batch["valid"] is not None
    assert (batch["tokens"][~batch["valid"]] == listops.PAD).all()
    assert loaded.train.vocab_size == len(listops.VOCABULARY) == 16


def test_generated_and_loaded_are_the_same(tmp_path: Path) -> None:
    generated = listops.load_generated(SIZES, distribution=SMALL)
    listops.write(tmp_path, listops.generate(SIZES, distribution=SMALL), parentheses=False)
    loaded = listops.load(tmp_path, max_length=60)
    assert (generated.test.labels == loaded.test.labels).all()
    assert (generated.test.rows.flat == loaded.test.rows.flat).all()


HEADER = "Source\tTarget\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold data"),
        (HEADER, "a header only"),
        ("[MAX 1 2 ]\t2\n", "line 1: must be the header"),
        (HEADER + "[MAX 1 2 ] 2\n", "line 2: must be Source<TAB>Target"),
        (HEADER + "[MAX 1 2 ]\t12\n", "line 2: the target must be a digit 0..9, got 12"),
        (HEADER + "[MAX 1 2 ]\tx\n", "line 2: the target must be a digit"),
        (HEADER + "[MAX 1 12 ]\t2\n", "line 2: expression: tokens must be separated"),
        (HEADER + "[MAX 1 -2 ]\t2\n", "line 2: expression: must be made of"),
        (HEADER + "[AVG 1 2 ]\t2\n", "line 2: expression: must be made of"),
        (HEADER + "b 1 2 ]\t2\n", "line 2: expression: must be made of .* got 'b'"),
        (HEADER + "[MAX 1 2 ]\t2\n[MAX 1 2\t2\n", "expression 2: every bracket must be closed"),
        (HEADER + "[MAX 1 2 ]\t2\n1 2 ]\t2\n", "expression 2: every bracket must be closed"),
        (HEADER + "[MAX 1 ] [MIN 2 ]\t2\n", "expression 1: every bracket must be closed"),
        (HEADER + "[MAX [MIN ] 1 ]\t2\n", "expression 1: .* at least one argument"),
        (HEADER + "( )\t2\n", "expression 1: must hold tokens"),
        (
            HEADER + "[MAX " + "1 " * 70 + "]\t1\n",
            "line 2: an expression must have at most max_length=60 tokens, got 72",
        ),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "basic_train.tsv"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"basic_train\.tsv: .*{message}"):
        listops.read(path, max_length=60)


def test_line_ends_of_either_kind_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"Source\tTarget\r\n( ( ( [MAX 1 ) 2 ) ] )\t2\r\n3\t3\r\n")
    rows, labels = listops.read(tmp_path / "a.tsv")
    assert [rows.row(i).tolist() for i in range(2)] == [[listops.MAX, 1, 2, listops.CLOSE], [3]]
    assert labels.tolist() == [2, 3]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"basic_train\.tsv"):
        listops.load(tmp_path)
    with pytest.raises(DataError, match=r"nowhere: must be a folder, got nothing there"):
        listops.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("field", "value"),
    [("operator_probability", 0.0), ("max_arguments", 1), ("max_depth", 0), ("min_length", -1), ("max_length", 500)],
)
def test_bad_tasks_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        listops.Distribution(**{field: value})


def test_asking_for_more_expressions_than_there_are_ends() -> None:
    digits = listops.Distribution(max_depth=1, min_length=0, max_length=5)
    with pytest.raises(ConfigError, match="too few different expressions"):
        listops.generate({"train": 11, "validation": 0, "test": 0}, distribution=digits)
    with pytest.raises(ConfigError, match=r"sizes\.test"):
        listops.generate({"train": 1, "validation": 0, "test": -1})
