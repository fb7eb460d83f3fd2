"""Folding: a planned tree of any size as few boxes, which together hold every node, token, request and vnode."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from fasttree_cupy.explain import ExplainedPlan, sum_subtrees

__all__ = ["MOST_BOXES", "Box", "Figures", "fold"]

MOST_BOXES = 60
"""As many as a person may want to read."""


class Figures(NamedTuple):
    """Sums over the nodes of a box; `requests` counts each request once, `split_q` nodes assigned Split-Q."""

    nodes: int
    tokens: int
    requests: int
    split_q: int
    vnodes_phase0: int
    vnodes_phase1: int


@dataclass
class Box:
    """One node, alike nodes, or the rest: subtrees for which there was no box left.

    Attributes
    ----------
    node : int
        Id of the first node that the box stands for.
    alike : bool
        Whether all its nodes are like that one, with alike subtrees; False for a rest.
    figures : Figures
    children : list of Box
        In the order of their first nodes, the rest last. A rest has none.
    """

    node: int
    alike: bool
    figures: Figures
    children: list[Box] = field(default_factory=list)
    _waiting: int = field(default=0, repr=False)  # kinds of children that have no box yet


def fold(explained: ExplainedPlan, most_boxes: int = MOST_BOXES) -> Box:
    """Fold a planned tree.

    Siblings that have the same figures and assignment and alike subtrees share a box. Where there still are
    more than `most_boxes`, the subtrees that read most are opened first, and what stays shut below a node
    becomes one box, its rest.

    Returns
    -------
    Box
        That of the root.

    Raises
    ------
    ValueError
        `most_boxes` is below 1.
    """
    if most_boxes < 1:
        raise ValueError(f"most_boxes is {most_boxes}, expected 1 or more")
    tree, shapes = explained.tree, _Shapes(explained)
    above = Box(-1, True, Figures(0, 0, 0, 0, 0, 0), _waiting=1)  # so that the root is a child like any other
    waiting: list[tuple[int, int, int, Box]] = []
    heappush(waiting, (0, 0, 1, above))
    boxes: list[Box] = [above]
    rests: list[tuple[int, int, Box]] = []
    num_boxes = 1  # were all that waits to become rests now
    while waiting:
        _, position, times, parent = heappop(waiting)
        groups = shapes.groups(position)
        more = (parent._waiting > 1) + (len(groups) > 0)
        if num_boxes + more > most_boxes:
            rests.append((position, times, parent))
            continue
        num_boxes += more
        parent._waiting -= 1
        box = Box(int(tree.breadth_first[position]), True, shapes.own(position, times), _waiting=len(groups))
        parent.children.append(box)
        boxes.append(box)
        for first, count in groups:
            heappush(waiting, (-shapes.work(first) * times * count, first, times * count, box))
    for box in boxes:
        box.children.sort(key=lambda child: shapes.position[child.node])
    for parent, figures, first in _merged(rests, shapes):
        parent.children.append(Box(int(tree.breadth_first[first]), False, figures))
    return above.children[0]


def _merged(rests: list[tuple[int, int, Box]], shapes: _Shapes) -> list[tuple[Box, Figures, int]]:
    """The rests of each parent as one: parent, figures, first position."""
    by_parent: dict[int, list[tuple[int, int, Box]]] = defaultdict(list)
    for rest in rests:
        by_parent[id(rest[2])].append(rest)
    merged = []
    for group in by_parent.values():
        columns = zip(*(shapes.whole(position, times) for position, times, _ in group), strict=True)
        merged.append((group[0][2], Figures(*map(sum, columns)), min(position for position, _, _ in group)))
    return merged


class _Shapes:
    """What folding asks about nodes, which it names by their breadth-first position."""

    def __init__(self, explained: ExplainedPlan) -> None:
        tree = explained.tree
        order, assigned = tree.breadth_first, explained.plan.node_assignments.astype(np.int64)
        self.position = np.empty(tree.num_nodes, np.int64)
        self.position[order] = np.arange(tree.num_nodes)
        # Children follow one another in breadth-first order.
        ends = np.cumsum(tree.num_children[order]) + 1
        self._children = list(zip((ends - tree.num_children[order]).tolist(), ends.tolist(), strict=True))
        own = np.stack([np.ones_like(assigned), tree.seqlen, explained.through, assigned, *explained.vnodes.T], axis=1)
        work = explained.served * explained.covered
        whole = sum_subtrees(tree, np.column_stack([own, work]))
        whole[:, 2] = explained.through  # below the node are the same requests
        self._own, self._whole = own[order], whole[order]
        # Where siblings agree in these and in what is below, they also serve and cover as much.
        self._kinds = self._find_kinds([tuple(row) for row in self._own.tolist()])

    def _find_kinds(self, facts: list[tuple[int, ...]]) -> list[int]:
        """A number for each node, the same where facts and subtrees are alike."""
        known: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        kinds = [0] * len(facts)
        for position in range(len(facts) - 1, -1, -1):
            first, end = self._children[position]
            kinds[position] = known.setdefault((facts[position], tuple(sorted(kinds[first:end]))), len(known))
        return kinds

    def groups(self, position: int) -> list[tuple[int, int]]:
        """The kinds of children of a node: position of the first child of the kind, and how many there are."""
        found: dict[int, list[int]] = {}
        for child in range(*self._children[position]):
            found.setdefault(self._kinds[child], [child, 0])[1] += 1
        return [(first, count) for first, count in found.values()]

    def work(self, position: int) -> int:
        """Tokens times requests, summed over the vnodes of a node and of all below."""
        return int(self._whole[position, -1])

    def own(self, position: int, times: int) -> Figures:
        return Figures(*(times * self._own[position]).tolist())

    def whole(self, position: int, times: int) -> Figures:
        return Figures(*(times * self._whole[position, :-1]).tolist())
