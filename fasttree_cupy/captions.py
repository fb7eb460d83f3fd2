"""What the picture of a plan says, in words: about the plan, and about each box."""

from __future__ import annotations

from dataclasses import dataclass

from fasttree_cupy.explain import ExplainedPlan
from fasttree_cupy.fold import Box

__all__ = ["Captions", "captions_of", "plan_captions"]

TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Captions:
    """The labels in a box, and those beside its bar."""

    name: str
    assignment: str
    sizes: str
    vnodes: str
    each: str


def captions_of(box: Box, explained: ExplainedPlan) -> Captions:
    """Captions of a box: figures are sums, "16 times 4 = 64" where alike nodes share the box."""
    return _alike(box, explained) if box.alike else _rest(box, explained)


def _alike(box: Box, explained: ExplainedPlan) -> Captions:
    node, figures, times = box.node, box.figures, box.figures.nodes
    tokens, requests = figures.tokens // times, figures.requests // times
    return Captions(
        name=f"node {node}" + (f" {TIMES} {times:,}" if times > 1 else ""),
        assignment="Split-Q" if figures.split_q else "Split-K",
        sizes=f"{product(times, tokens)} {plural('token', figures.tokens)}, "
        f"{product(times, requests)} {plural('request', figures.requests)}",
        vnodes=_vnodes(box, explained),
        each=_each(box, explained),
    )


def _rest(box: Box, explained: ExplainedPlan) -> Captions:
    nodes, tokens, requests, split_q, *_ = box.figures
    assignments = {"Split-K": nodes - split_q, "Split-Q": split_q}
    return Captions(
        name=f"{counted(nodes, 'node')} folded",
        assignment=", ".join(f"{count:,} {name}" for name, count in assignments.items() if count),
        sizes=f"{counted(tokens, 'token')}, {counted(requests, 'request')}",
        vnodes=_vnodes(box, explained),
        each="",
    )


def _vnodes(box: Box, explained: ExplainedPlan) -> str:
    """How many vnodes there are, how the number comes about where alike nodes share the box, and the phases."""
    phases = box.figures[-2:]
    if sum(phases) == 0:
        return "no vnodes"
    grid, shape = explained.grid(box.node) if box.alike else None, ""
    if grid is not None:
        times = f"{box.figures.nodes:,} {TIMES} " if box.figures.nodes > 1 else ""
        shape = f" = {times}{counted(grid.splits, 'split')} {TIMES} {counted(grid.tiles, 'tile')}"
    where = ", ".join(
        f"{count:,} in phase {phase}" if min(phases) else f"phase {phase}"
        for phase, count in enumerate(phases)
        if count
    )
    return f"{counted(sum(phases), 'vnode')}{shape}; {where}"


def _each(box: Box, explained: ExplainedPlan) -> str:
    """What the vnodes of one node cover."""
    through, served = int(explained.through[box.node]), int(explained.served[box.node])
    own, covered = int(explained.tree.seqlen[box.node]), int(explained.covered[box.node])
    if served == 0:
        return "all requests went to Split-Q children"
    each = "each for" if box.figures.nodes > 1 else "for"
    requests = counted(served, "request") if served == through else f"{served:,} of {through:,} requests"
    along = f" ({covered - own:,} taken along)" if covered > own else ""
    return f"{each} {requests}, {counted(covered, 'token')}{along}"


def plan_captions(explained: ExplainedPlan) -> list[str]:
    """The plan in two lines: what came out, and with which sizes."""
    tree, made = explained.tree, explained.plan
    pairs = {
        "query tiles": made.q_tile_sizes,
        "KV tiles": made.kv_tile_sizes,
        "KV splits": made.kv_split_sizes,
    }
    sizes = ", ".join(f"{name} {first:,} and {second:,}" for name, (first, second) in pairs.items())
    heads = f"{explained.num_qo_heads} query heads, {explained.num_kv_heads} KV heads"
    return [
        f"{counted(tree.num_nodes, 'node')}: {tree.num_nodes - explained.num_split_q:,} Split-K, "
        f"{explained.num_split_q:,} Split-Q; {counted(tree.batch_size, 'request')}; "
        f"{counted(tree.unique_tokens, 'token')}; vnodes: {made.phase_node_nums[0]:,} in phase 0, "
        f"{made.phase_node_nums[1]:,} in phase 1",
        f"{explained.gpu}, {heads}; adopted in phases 0 and 1: {sizes}",
    ]


def product(times: int, each: int) -> str:
    return f"{times:,} {TIMES} {each:,} = {times * each:,}" if times > 1 else f"{each:,}"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {plural(noun, count)}"


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"
