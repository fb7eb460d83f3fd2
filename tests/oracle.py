"""A slow, obvious planner in plain Python, from the words of the heuristic: what the Numba planner must equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fasttree_cupy.tree import KVTree

__all__ = ["Oracle", "Settings"]


class Oracle:
    """The heuristic in plain Python: one small method a step, lists and sets, no attention to speed."""

    def __init__(self, tree: KVTree, settings: Settings) -> None:
        self.settings = settings
        self.parent = tree.parent.tolist()
        self.seqlen = tree.seqlen.tolist()
        self.nodes = range(len(self.parent))
        self.children = [[c for c in self.nodes if self.parent[c] == n] for n in self.nodes]
        self.ending = [[r for r, e in enumerate(tree.request_node.tolist()) if e == n] for n in self.nodes]
        self.batch_size = tree.batch_size
        self.q_tiles, self.kv_tiles = list(settings.TSQs), list(settings.TSKs)
        self.splits = [settings.kv_split_sizes[0]] * 2

    def subtree(self, node: int) -> list[int]:
        below = [r for child in self.children[node] for r in self.subtree(child)]
        return sorted(self.ending[node] + below)

    def phase(self, num_q: int) -> int:
        return 0 if num_q > self.q_tiles[1] else 1

    def cost(self, num_q: int, num_kv: int) -> float:
        s, phase = self.settings, self.phase(num_q)
        pad_q = self.q_tiles[phase] - ((num_q - 1) % self.q_tiles[phase] + 1)
        pad_kv = max(0, self.kv_tiles[phase] - num_kv)
        return s.alpha * pad_q * s.kv_group_num * num_kv + s.beta * pad_kv * num_q * s.kv_group_num

    def assign(self) -> None:
        self.assigned = [0 for _ in self.nodes]
        length = list(self.seqlen)
        queue = [self.parent.index(-1)]
        while queue:
            node = queue.pop(0)
            num_q = len(self.subtree(node))
            for child in self.children[node]:
                n = len(self.subtree(child))
                split_k = self.cost(num_q, length[node]) + self.cost(n, length[child]) + self.settings.gamma * n
                split_q = self.cost(num_q - n, length[node]) + self.cost(n, length[child] + length[node])
                if split_k > split_q:
                    self.assigned[child] = 1
                    num_q -= n
                    length[child] += length[node]
                queue.append(child)

    def completion_order(self) -> list[int]:
        open_children = [len(c) for c in self.children]
        queue = [n for n in self.nodes if not self.children[n]]
        for node in queue:
            above = self.parent[node]
            if above >= 0:
                open_children[above] -= 1
                if open_children[above] == 0:
                    queue.append(above)
        return queue

    def requests(self, node: int) -> list[int]:
        taken = list(self.ending[node])
        for child in self.completion_order():
            if self.parent[child] == node and self.assigned[child] == 0:
                taken += self.subtree(child)
        return taken

    def rows(self, node: int) -> list[int]:
        first = sum(self.seqlen[:node])
        own = list(range(first, first + self.seqlen[node]))
        return self.rows(self.parent[node]) + own if self.assigned[node] else own

    def parallelism(self) -> list[int]:
        blocks = [0, 0]
        for node in self.nodes:
            num_q, num_kv = len(self.requests(node)), len(self.rows(node))
            if num_q:
                p = self.phase(num_q)
                blocks[p] += -(-num_kv // self.splits[p]) * -(-num_q // self.q_tiles[p])
        return [b * self.settings.num_kv_heads for b in blocks]

    def run(self) -> dict[str, Any]:
        rounds = []
        for k in range(3):
            self.assign()
            rounds.append(self.parallelism())
            if k == 2 or not (self.reduce(rounds[-1]) if k == 0 else self.unify(rounds[-1])):
                break
        return {**self.layout(), "parallelism": rounds}

    def reduce(self, blocks: list[int]) -> bool:
        low = [p for p in (0, 1) if 0 < blocks[p] < self.settings.para_threshs1[p]]
        for p in low:
            self.splits[p] = self.settings.kv_split_sizes[1]
        return bool(low)

    def unify(self, blocks: list[int]) -> bool:
        for p in (0, 1):
            if 0 < blocks[p] < self.settings.para_threshs2[p]:
                self.q_tiles = [self.q_tiles[1 - p]] * 2
                self.kv_tiles = [self.kv_tiles[1 - p]] * 2
                return True
        return False

    def layout(self) -> dict[str, Any]:
        kv_entries: list[int] = []
        q_entries: list[int] = []
        vnodes = []
        for node in self.nodes:
            requests, rows = self.requests(node), self.rows(node)
            if not requests:
                continue
            split = self.splits[self.phase(len(requests))]
            for start in range(0, len(rows), split):
                for tile in range(0, len(requests), self.q_tiles[0]):
                    kv = len(kv_entries) + start, len(rows[start : start + split])
                    q = len(q_entries) + tile, len(requests[tile : tile + self.q_tiles[0]])
                    vnodes.append((*kv, *q))
                q_entries += requests
            kv_entries += rows
        first = [v for v in vnodes if v[3] > self.q_tiles[1]]
        second = [v for v in vnodes if v[3] <= self.q_tiles[1]]
        columns = list(zip(*(first + second), strict=True)) or [(), (), (), ()]
        places = [[k for k, r in enumerate(q_entries) if r == request] for request in range(self.batch_size)]
        lens = [len(p) for p in places]
        return {
            "vnode_to_kv_entries": kv_entries,
            "vnode_to_kv_offs": list(columns[0]),
            "vnode_to_kv_lens": list(columns[1]),
            "vnode_to_q_entries": q_entries,
            "vnode_to_q_offs": list(columns[2]),
            "vnode_to_q_lens": list(columns[3]),
            "req_to_vnode_entries": [k for p in places for k in p],
            "req_to_vnode_offs": [sum(lens[:r]) for r in range(self.batch_size)],
            "req_to_vnode_lens": lens,
            "phase_node_nums": [len(first), len(second)],
            "phase_node_offsets": [0, len(first)],
            "node_assignments": self.assigned,
            "q_tile_sizes": self.q_tiles,
            "kv_tile_sizes": self.kv_tiles,
            "kv_split_sizes": self.splits,
        }


@dataclass(frozen=True)
class Settings:
    """The arguments of ``plan`` after the tree."""

    kv_split_sizes: list[int]
    para_threshs1: list[int]
    para_threshs2: list[int]
    num_kv_heads: int
    alpha: float
    beta: float
    gamma: float
    TSQs: list[int]
    TSKs: list[int]
    kv_group_num: int
