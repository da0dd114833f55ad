"""Growing many ListOps trees at once, level by level, with array operations.

The distribution is that of drawing each tree on its own, node by node; only one tree in about fifteen has a length that
the task keeps, so that a hundred thousand samples need over a million trees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sma_models.training.data.randomness import Draws

Ints = NDArray[np.int64]
CLOSE = 14  # the operators are 0 MIN, 1 MAX, 2 MED, 3 SM here and the tokens 10..13 in writing


@dataclass
class Level:
    """The nodes of one depth of all trees; the children of a node stand together in the next level.

    Attributes:
        tree: (n,) which tree a node belongs to.
        parent: (n,) its parent's place in the level above.
        arguments: (n,) number of children, 0 for a digit.
    """

    tree: Ints
    parent: Ints
    arguments: Ints

    def keep(self, kept: NDArray[np.bool_], above: NDArray[np.bool_]) -> Level:
        """The nodes of the kept trees; ``above`` tells which nodes of the level above were kept."""
        renumber = np.cumsum(above) - 1
        return Level(self.tree[kept], renumber[self.parent[kept]], self.arguments[kept])


def grow(
    draws: Draws, count: int, probability: float, max_arguments: int, max_depth: int, max_length: int
) -> Iterator[tuple[bytes, int]]:
    """Draw ``count`` trees and give (tokens, value) of those that have fewer than ``max_length`` tokens.

    Args:
        draws: the source of randomness.
        count: number of trees.
        probability: chance that a node above ``max_depth`` is an operator.
        max_arguments: an operator has 2 .. max_arguments arguments, each number equally likely.
        max_depth: nodes at this depth are digits; the root has depth 1.
        max_length: trees of this length and more are dropped as soon as they are seen to reach it.

    Yields:
        The tokens of :data:`~sma_models.training.data.listops.VOCABULARY`, one byte each, and the value 0..9.
    """
    levels, alive = _shapes(draws, count, probability, max_arguments, max_depth, max_length)
    above = np.ones(count, dtype=bool)
    kept_levels = []
    for level in levels:
        kept = alive[level.tree]
        kept_levels.append(level.keep(kept, above))
        above = kept
    if not alive.any():
        return
    values, operators = _values(draws, kept_levels)
    tokens, offsets = _serialise(kept_levels, values, operators)
    for start, stop, value in zip(offsets[:-1], offsets[1:], values[0], strict=True):
        yield tokens[start:stop].tobytes(), int(value)


def _shapes(
    draws: Draws, count: int, probability: float, max_arguments: int, max_depth: int, max_length: int
) -> tuple[list[Level], NDArray[np.bool_]]:
    """The levels of ``count`` trees, and which of the trees are shorter than ``max_length``."""
    tree, parent = np.arange(count), np.arange(count)
    length = np.zeros(count, dtype=np.int64)
    alive = np.ones(count, dtype=bool)
    levels: list[Level] = []
    for depth in range(1, max_depth + 1):
        arguments = np.zeros(len(tree), dtype=np.int64)
        if depth < max_depth:
            operator = draws.uniform(len(tree)) < probability
            arguments[operator] = 2 + draws.below(max_arguments - 1, int(operator.sum()))
        levels.append(Level(tree, parent, arguments))
        # A digit is one token; an operator is two (with its bracket), and each argument will be at least one more.
        length += np.bincount(tree, weights=1 + (arguments > 0), minlength=count).astype(np.int64)
        pending = np.bincount(tree, weights=arguments, minlength=count).astype(np.int64)
        alive &= length + pending < max_length
        repeats = np.where(alive[tree], arguments, 0)
        parent = np.repeat(np.arange(len(tree)), repeats)
        tree = tree[parent]
        if not len(tree):
            break
    return levels, alive


def _values(draws: Draws, levels: list[Level]) -> tuple[list[Ints], list[Ints]]:
    """Per level the value of every node and the kind of its operator (whatever for digits), from the leaves up."""
    values: list[Ints] = [np.empty(0, dtype=np.int64)] * len(levels)
    operators: list[Ints] = [np.empty(0, dtype=np.int64)] * len(levels)
    for depth in reversed(range(len(levels))):
        level = levels[depth]
        values[depth] = draws.below(10, len(level.tree))
        operators[depth] = draws.below(4, len(level.tree))
        nodes = np.flatnonzero(level.arguments)
        if len(nodes):
            values[depth][nodes] = _combine(values[depth + 1], level.arguments[nodes], operators[depth][nodes])
    return values, operators


def _combine(arguments: Ints, counts: Ints, operators: Ints) -> Ints:
    """Apply operator i to the next ``counts[i]`` of ``arguments``."""
    starts = np.cumsum(counts) - counts
    group = np.repeat(np.arange(len(counts)), counts)
    ordered = arguments[np.lexsort((arguments, group))]
    median = (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]) // 2
    choices = [ordered[starts], ordered[starts + counts - 1], median, np.add.reduceat(arguments, starts) % 10]
    return np.choose(operators, choices)


def _serialise(levels: list[Level], values: list[Ints], operators: list[Ints]) -> tuple[NDArray[np.uint8], Ints]:
    """The trees in writing, end to end, and where each starts (with the end of the last)."""
    sizes = [np.where(level.arguments > 0, 2, 1) for level in levels]
    for depth in reversed(range(1, len(levels))):
        below = np.bincount(levels[depth].parent, weights=sizes[depth], minlength=len(sizes[depth - 1]))
        sizes[depth - 1] = sizes[depth - 1] + below.astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes[0])])
    flat = np.empty(int(offsets[-1]), dtype=np.uint8)
    place = offsets[:-1]
    for depth, level in enumerate(levels):
        if depth:
            ahead = np.cumsum(sizes[depth]) - sizes[depth]
            first = np.flatnonzero(np.diff(level.parent, prepend=-1))  # the eldest child of each parent
            eldest = np.repeat(ahead[first], np.diff(np.append(first, len(level.parent))))
            place = place[level.parent] + 1 + ahead - eldest
        operator = level.arguments > 0
        flat[place] = np.where(operator, 10 + operators[depth], values[depth])
        flat[(place + sizes[depth] - 1)[operator]] = CLOSE
    return flat, offsets
