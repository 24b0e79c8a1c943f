"""What a pattern of pairs determines before any value is known: an order of elimination, its fill, its components.

A pattern is analysed once, on the host, and kept: by the tensor that holds it, and by its content.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...checks import fail


@dataclass(frozen=True)
class Elimination:
    """The nonzeros of I + S = L D V, L and V^T unit lower triangular with the same nonzeros, for P patterns."""

    order: Tensor  # (P, D) int32, the vertex eliminated at each step
    start: Tensor  # (P, D + 1) int64, where each step's column of L, and row of V, begins in rows
    rows: Tensor  # (nonzeros of all,) int32, the vertices of that column in order of elimination
    slots: Tensor  # (P, K) int64, where theta lies in V and -theta in L; ~slot where theta lies in L and -theta in V


@dataclass(frozen=True)
class Group:
    """The components of one size m, n of them."""

    vertices: Tensor  # (n, m)
    entries: Tensor  # (k,) which numbers of theta lie in them
    places: Tensor  # (3, k) component, row and column of each


class Pattern:
    """The analysis of K pairs (a, b) of D vertices, each part made when it is first asked for."""

    def __init__(self, size: int, pairs: list[tuple[int, int]]) -> None:
        for a, b in pairs:
            if not (0 <= a < size and 0 <= b < size and a != b):
                raise fail("sparse_cayley", "pairs", f"be two different numbers from 0 to D - 1 = {size - 1}", (a, b))
        if len({(min(p), max(p)) for p in pairs}) < len(pairs):
            raise fail("sparse_cayley", "pairs", "be distinct", f"{len(pairs)} with a repetition")
        self.size = size
        self.pairs = pairs
        self._groups: dict[torch.device, list[Group]] = {}

    @cached_property
    def _eliminated(self) -> tuple[list[int], list[list[int]]]:
        """The vertices and their later neighbours. By minimum degree: whose neighbours are fewest is next, and they
        become each other's."""
        near = self._neighbours()  # a set of vertices is an int with a bit for each
        degree = [n.bit_count() for n in near]
        rest, order, columns = set(range(self.size)), [], []
        while rest:
            v = min(rest, key=degree.__getitem__)
            rest.remove(v)
            order.append(v)
            columns.append(list(_bits(near[v])))
            for u in columns[-1]:
                near[u] = (near[u] | near[v]) & ~(1 << u | 1 << v)
                degree[u] = near[u].bit_count()
        step = {v: k for k, v in enumerate(order)}
        return order, [sorted(column, key=step.__getitem__) for column in columns]

    @property
    def order(self) -> list[int]:
        return self._eliminated[0]

    def elimination(self, offset: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """The parts of an `Elimination` for this pattern, whose nonzeros begin at ``offset``."""
        order, columns = self._eliminated
        step = {v: k for k, v in enumerate(order)}
        start: list[int] = [offset]
        rows: list[int] = []
        slot: dict[tuple[int, int], int] = {}
        for v, column in zip(order, columns):
            slot |= {(v, u): start[-1] + i for i, u in enumerate(column)}
            rows += column
            start.append(offset + len(rows))
        slots = [slot[a, b] if step[a] < step[b] else ~slot[b, a] for a, b in self.pairs]
        return order, start, rows, slots

    @cached_property
    def components(self) -> list[list[int]]:
        """The vertices of each connected component of two vertices or more."""
        near, left, found = self._neighbours(), (1 << self.size) - 1, []
        while left:
            part, edge = 0, left & -left
            while edge:
                part |= edge
                edge = _union(near, edge) & ~part
            left &= ~part
            if part & (part - 1):
                found.append(list(_bits(part)))
        return found

    def groups(self, device: torch.device) -> list[Group]:
        """The components by size, as index tensors on ``device``."""
        if device not in self._groups:
            place = {v: (len(c), i, j) for i, c in enumerate(self.components) for j, v in enumerate(c)}
            by_size: dict[int, list[int]] = {}
            for i, c in enumerate(self.components):
                by_size.setdefault(len(c), []).append(i)
            rank = {i: n for numbers in by_size.values() for n, i in enumerate(numbers)}
            found = []
            for size, numbers in sorted(by_size.items()):
                entries = [k for k, (a, _) in enumerate(self.pairs) if place[a][0] == size]
                places = [(rank[place[a][1]], place[a][2], place[b][2]) for a, b in (self.pairs[k] for k in entries)]
                tensors = [self.components[i] for i in numbers], entries, list(zip(*places))
                found.append(Group(*(torch.tensor(t, device=device) for t in tensors)))
            self._groups[device] = found
        return self._groups[device]

    def _neighbours(self) -> list[int]:
        near = [0] * self.size
        for a, b in self.pairs:
            near[a] |= 1 << b
            near[b] |= 1 << a
        return near


class Patterns:
    """The pattern of all heads, or one for each."""

    def __init__(self, pairs: Tensor, size: int) -> None:
        self.size = size
        self.version = _version(pairs)
        each = pairs if pairs.dim() == 3 else pairs.unsqueeze(0)
        self.each = [_pattern(size, tuple(p.flatten().tolist())) for p in each]

    @cached_property
    def elimination(self) -> Elimination:
        parts: list[tuple[list[int], list[int], list[int], list[int]]] = []
        for pattern in self.each:
            parts.append(pattern.elimination(parts[-1][1][-1] if parts else 0))
        order, start, rows, slots = zip(*parts)
        return Elimination(
            torch.tensor(order, dtype=torch.int32, device="cpu"),
            torch.tensor(start, dtype=torch.int64, device="cpu"),
            torch.tensor([v for column in rows for v in column], dtype=torch.int32, device="cpu"),
            torch.tensor(slots, dtype=torch.int64, device="cpu"),
        )


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def patterns_of(
    pairs: Tensor,  # (K, 2) or (H, K, 2)
    size: int,
) -> Patterns:
    """The analysis of a pattern. That of a tensor unknown so far is read from its device."""
    found: Patterns | None = _known.get(pairs)
    if found is None or (found.size, found.version) != (size, _version(pairs)):
        found = _known[pairs] = Patterns(pairs, size)
    return found


def _version(pairs: Tensor) -> int:
    return 0 if pairs.is_inference() else pairs._version


@lru_cache(maxsize=32)
def _pattern(size: int, flat: tuple[int, ...]) -> Pattern:
    return Pattern(size, list(zip(flat[::2], flat[1::2])))


def _bits(x: int) -> Iterator[int]:
    while x:
        low = x & -x
        yield low.bit_length() - 1
        x ^= low


def _union(near: list[int], vertices: int) -> int:
    found = 0
    for v in _bits(vertices):
        found |= near[v]
    return found
