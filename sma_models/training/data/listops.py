"""ListOps: nested operations on lists of digits (Nangia and Bowman 2018, in the long version of Long Range Arena).

``[MAX 2 9 [MIN 4 7 ] 0 ]`` has the value 9. The published task (arXiv 2011.04006) draws a tree from the root: a node
is an operator with probability 1/4 while its depth (root = 1) is below 10, with 2 to 10 arguments, and a digit
otherwise; a tree is kept when it has more than 500 and fewer than 2,000 tokens, brackets counted, and was not drawn
before. ``MED`` is the median rounded down, ``SM`` the sum modulo 10. The labels are as balanced as they happen to fall.

The files of the official release have the columns ``Source<TAB>Target`` and write every expression with parentheses
around each application, ``( ( ( [MAX 2 ) 9 ) ] )``; they carry no information and are dropped on reading.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sma.errors import ConfigError, DataError
from sma_models.training.data import long_range_arena
from sma_models.training.data.base import PaddedData, Task, classification
from sma_models.training.data.labelled import Ragged, Splits, TokenDataset
from sma_models.training.data.listops_trees import grow
from sma_models.training.data.randomness import LISTOPS, Draws
from sma_models.training.data.reading import Pathlike, find_folder, read_lines, reject
from sma_models.training.data.release import cache_folder

VOCABULARY = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]", "<pad>")
"""Token i is written ``VOCABULARY[i]``."""
MIN, MAX, MED, SM, CLOSE, PAD = range(10, 16)
FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
PLACES = (".", "listops-1000", "listops", "lra_release/listops-1000", "lra_release/lra_release/listops-1000")
SIZES = {"train": 96_000, "validation": 2_000, "test": 2_000}
"""The sizes of the published task."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """The distribution of the expressions; the defaults are the published task's.

    Attributes:
        operator_probability: chance that a node is an operator.
        max_arguments: an operator has 2 .. max_arguments arguments.
        max_depth: nodes at this depth are digits (the root has depth 1).
        min_length: an expression has more tokens than this,
        max_length: and fewer than this.
    """

    operator_probability: float = 0.25
    max_arguments: int = 10
    max_depth: int = 10
    min_length: int = 500
    max_length: int = 2000

    def __post_init__(self) -> None:
        if not 0.0 < self.operator_probability <= 1.0:
            raise ConfigError(f"operator_probability: must be above 0 and at most 1, got {self.operator_probability!r}")
        for field, least in (("max_arguments", 2), ("max_depth", 1), ("min_length", 0)):
            if getattr(self, field) < least:
                raise ConfigError(f"{field}: must be at least {least}, got {getattr(self, field)!r}")
        if self.max_length <= self.min_length + 1:
            raise ConfigError(
                f"max_length: must exceed min_length + 1 = {self.min_length + 1}, got {self.max_length!r}"
            )


Sample = tuple[bytes, int]


def generate(
    sizes: Mapping[str, int] = SIZES, *, seed: int = 0, distribution: Distribution | None = None
) -> dict[str, list[Sample]]:
    """Draw the samples of each split; no expression occurs twice, within a split or across splits.

    The test and validation samples depend on the seed and their own sizes only, not on the size of the training split.

    Args:
        sizes: number of samples for each of "train", "validation" and "test".
        seed: the same seed gives the same samples on every machine.
        distribution: of the expressions; None means the published one.

    Returns:
        Pairs (tokens, value 0..9) for each split; the tokens are bytes, byte i for token i of :data:`VOCABULARY`.

    Raises:
        ConfigError: a size is negative or the distribution has too few different expressions.
    """
    seen: set[bytes] = set()
    splits: dict[str, list[Sample]] = {}
    for number, name in enumerate(("test", "validation", "train")):
        if sizes[name] < 0:
            raise ConfigError(f"sizes.{name}: must be at least 0, got {sizes[name]!r}")
        splits[name] = _draw(sizes[name], seed, number, distribution or Distribution(), seen)
    return splits


def _draw(count: int, seed: int, number: int, distribution: Distribution, seen: set[bytes]) -> list[Sample]:
    d = distribution
    samples: list[Sample] = []
    fruitless = 0
    chunk = number << 40  # splits draw from far-apart counters
    while len(samples) < count:
        before = len(samples)
        draws = Draws(seed, LISTOPS, chunk)
        chunk += 1
        grown = grow(draws, 4096, d.operator_probability, d.max_arguments, d.max_depth, d.max_length)
        for tokens, value in grown:
            if len(tokens) > d.min_length and tokens not in seen and len(samples) < count:
                seen.add(tokens)
                samples.append((tokens, value))
        fruitless = 0 if len(samples) > before else fruitless + 1
        if fruitless == 100:
            raise ConfigError(
                f"sizes: must not exceed the expressions that there are, got {count}; {distribution} seems to have "
                "too few different expressions"
            )
    return samples


def evaluate(tokens: Sequence[int]) -> int:
    """The value of an expression, by the definition of the operators.

    Args:
        tokens: numbers of :data:`VOCABULARY`.

    Raises:
        DataError: the brackets do not match, an operator has no argument, or a token is not one of an expression.
    """
    stack: list[list[int]] = [[]]
    operators: list[int] = []
    for position, token in enumerate(tokens):
        if token < 10:
            stack[-1].append(token)
        elif token < CLOSE:
            operators.append(token)
            stack.append([])
        elif token == CLOSE and operators and stack[-1]:
            arguments = stack.pop()
            stack[-1].append(_apply(operators.pop(), arguments))
        else:
            raise DataError(f"expression, token {position}: must continue a well-formed expression, got token {token}")
    if operators or len(stack[0]) != 1:
        raise DataError(f"expression: must be one value or one closed list, got {len(tokens)} tokens that are not")
    return stack[0][0]


def _apply(operator: int, arguments: list[int]) -> int:
    if operator == MIN:
        return min(arguments)
    if operator == MAX:
        return max(arguments)
    if operator == SM:
        return sum(arguments) % 10
    ordered = sorted(arguments)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def to_source(tokens: Sequence[int], parentheses: bool = True) -> str:
    """An expression as the official release writes it.

    An operator with arguments a, b is applied to one after the other, ``( ( ( [MAX a ) b ) ] )``.
    """
    if not parentheses:
        return to_text(tokens)
    stack: list[list[str]] = [[]]
    for token in tokens:
        if token == CLOSE:
            operator, *arguments = stack.pop()
            opening = "( " * (len(arguments) + 1)
            stack[-1].append(f"{opening}{operator} {' ) '.join(arguments)} ) ] )")
        elif token >= 10:
            stack.append([VOCABULARY[token]])
        else:
            stack[-1].append(VOCABULARY[token])
    return stack[0][0]


_SHORT = ((b"[MIN", b"a"), (b"[MAX", b"b"), (b"[MED", b"c"), (b"[SM", b"d"))
_TO_TOKENS = bytes.maketrans(b"0123456789abcd]", bytes(range(15)))
_TO_SHAPE = bytes(32 if byte in b"() " else 120 for byte in range(256))  # a space or an x


def parse(source: bytes) -> bytes:
    """The tokens of a written expression, one byte each; parentheses are dropped.

    Raises:
        DataError: something in it is not a token. (Whether it is well-formed, :func:`evaluate` tells.)
    """
    strange = b"".join(letter for _, letter in _SHORT if letter in source)
    for long, short in _SHORT:
        source = source.replace(long, short)
    tokens = source.translate(None, b"() ")
    strange += tokens.translate(None, b"0123456789abcd]")
    if strange:
        named = strange[:20].decode("utf-8", "replace")
        raise DataError(f"expression: must be made of {' '.join(VOCABULARY[:-1])} ( ), got {named!r}")
    # Without this, 12 would be read as 1 2.
    if (touching := source.translate(_TO_SHAPE).find(b"xx")) >= 0:
        raise DataError(f"expression: tokens must be separated by spaces, got two that touch at {touching}")
    return tokens.translate(_TO_TOKENS)


def write(root: Pathlike, splits: Mapping[str, Sequence[Sample]], parentheses: bool = True) -> None:
    """Write ``basic_train.tsv``, ``basic_val.tsv`` and ``basic_test.tsv``, each complete or not at all."""
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in splits.items():
        unfinished = folder / f".{FILES[name]}.unfinished"
        with open(unfinished, "w", encoding="ascii", newline="\n") as file:
            file.write("Source\tTarget\n")
            file.writelines(f"{to_source(tokens, parentheses)}\t{value}\n" for tokens, value in samples)
        os.replace(unfinished, folder / FILES[name])


def read(path: Pathlike, max_length: int = 2000) -> tuple[Ragged, NDArray[np.int64]]:
    """Read one file of the official layout.

    Args:
        path: a ``Source<TAB>Target`` file.
        max_length: no expression may have more tokens; a shortened expression would have no value.

    Returns:
        The expressions and their values (N,).

    Raises:
        DataError: missing, empty, no header, a line without tab, a strange token, brackets that do not match, a value
            out of range, an expression that is too long.
    """
    rows: list[bytes] = []
    labels: list[int] = []
    for number, tokens, label in _read_samples(path):
        if len(tokens) > max_length:
            reject(path, f"line {number}: an expression must have at most max_length={max_length} tokens", len(tokens))
        rows.append(tokens)
        labels.append(label)
    if not rows:
        reject(path, "must hold expressions", "a header only")
    ragged = Ragged.join(rows)
    _check_brackets(path, ragged)
    return ragged, np.array(labels, dtype=np.int64)


def _read_samples(path: Pathlike) -> Iterator[tuple[int, bytes, int]]:
    for count, (number, line) in enumerate(read_lines(path)):
        source, tab, target = line.rpartition(b"\t")
        if not tab:
            reject(path, f"line {number}: must be Source<TAB>Target", line[:40].decode("utf-8", "replace"))
        if count == 0:
            if (source, target) != (b"Source", b"Target"):
                reject(path, "line 1: must be the header Source<TAB>Target", line[:40].decode("utf-8", "replace"))
            continue
        if len(target) != 1 or not target.isdigit():
            reject(path, f"line {number}: the target must be a digit 0..9", target[:40].decode("utf-8", "replace"))
        try:
            tokens = parse(source)
        except DataError as error:
            raise DataError(f"{os.fspath(path)}: line {number}: {error}") from None
        yield number, tokens, int(target)


def _check_brackets(path: Pathlike, rows: Ragged) -> None:
    """A well-formed expression is a digit, or is open from its first token to the one before its last."""
    if (rows.lengths == 0).any():
        reject(path, f"expression {int((rows.lengths == 0).argmax()) + 1}: must hold tokens", "none")
    step = np.zeros(16, dtype=np.int64)
    step[10:CLOSE] = 1
    step[CLOSE] = -1
    depth = np.cumsum(step[rows.flat])  # starts at 0 in every expression, or an earlier one is reported
    last = rows.offsets[1:] - 1
    open_after = depth[last] != 0
    depth[last] = 1
    closed_before = np.minimum.reduceat(depth, rows.offsets[:-1]) < 1
    hollow = (rows.flat[1:] == CLOSE) & (rows.flat[:-1] >= 10) & (rows.flat[:-1] < CLOSE)
    empty = np.zeros(len(rows), dtype=bool)
    empty[np.searchsorted(rows.offsets, np.flatnonzero(hollow), side="right") - 1] = True
    bad = open_after | closed_before | empty
    if bad.any():
        rule = "every bracket must be closed, around at least one argument"
        reject(path, f"expression {int(bad.argmax()) + 1}: {rule}", to_text(rows.row(int(bad.argmax())).tobytes()))


def to_text(tokens: Sequence[int]) -> str:
    """Any tokens in writing, without parentheses."""
    return " ".join(VOCABULARY[token] for token in tokens)


def load(root: Pathlike, max_length: int = 2000) -> Splits[TokenDataset]:
    """The three files of the official layout below ``root`` (errors as :func:`read`)."""
    folder = find_folder(root, PLACES, FILES["train"])
    return _splits({name: read(folder / file, max_length) for name, file in FILES.items()}, max_length)


def load_generated(
    sizes: Mapping[str, int] = SIZES, *, seed: int = 0, distribution: Distribution | None = None
) -> Splits[TokenDataset]:
    """The same task without files: see :func:`generate`."""
    drawn = generate(sizes, seed=seed, distribution=distribution)
    arrays = {
        name: (Ragged.join(tokens for tokens, _ in samples), np.array([value for _, value in samples], dtype=np.int64))
        for name, samples in drawn.items()
    }
    return _splits(arrays, (distribution or Distribution()).max_length)


def _splits(arrays: Mapping[str, tuple[Ragged, NDArray[np.int64]]], max_length: int) -> Splits[TokenDataset]:
    parts = {name: TokenDataset(rows, labels, 10, PAD) for name, (rows, labels) in arrays.items()}
    return Splits(
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        max_length=max_length,
        classes=tuple(str(digit) for digit in range(10)),
    )


class ListOpsData(PaddedData):
    """ListOps: from the files of the official release, or drawn from the published distribution."""

    release = long_range_arena.RELEASE

    @dataclass(kw_only=True, frozen=True)
    class Config(PaddedData.Config):
        """Without ``root``, samples are generated once, by ``seed``, and kept in the cache."""

        root: str | None = None
        max_length: int = 2000
        min_length: int = 500
        max_depth: int = 10
        max_arguments: int = 10
        train: int = 96_000
        validation: int = 2_000
        test: int = 2_000
        seed: int = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("train", "validation", "test"):
                self.require(getattr(self, name) >= 1, name, "must be at least 1")
            self.require(0 <= self.seed < 2**63, "seed", "must be at least 0 and below 2**63")

    config: Config

    def prepare(self) -> Path:
        c = self.config
        if c.root is not None:
            return super().prepare()
        sizes = {"train": c.train, "validation": c.validation, "test": c.test}
        shape = "-".join(
            str(n) for n in (*sizes.values(), c.min_length, c.max_length, c.max_depth, c.max_arguments, c.seed)
        )
        folder = cache_folder() / f"listops-generated-{shape}"
        # The training split is written last, so a folder that has it is complete.
        if not (folder / FILES["train"]).exists():
            distribution = Distribution(
                max_arguments=c.max_arguments, max_depth=c.max_depth, min_length=c.min_length, max_length=c.max_length
            )
            drawn = generate(sizes, seed=c.seed, distribution=distribution)
            write(folder, {name: drawn[name] for name in ("test", "validation", "train")})
        return folder

    def open(self, *, seed: int) -> Task:
        return classification(load(self.prepare(), self.config.max_length), self.config.pad_to)
