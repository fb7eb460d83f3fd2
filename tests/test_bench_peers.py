"""The peers' adapters without a GPU: torch on the CPU, and stand-ins for FlashInfer and the Triton kernels.

The stand-ins follow the documented meaning of the arguments, so a wrong index array gives a wrong output.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.check import Reference
from bench.contestants import Contestant, UnsuitedError
from bench.peers.dense_cupy import DenseCupy
from bench.peers.fasttree_triton import FastTreeTriton
from bench.peers.flashinfer_cascade import FlashInferCascade
from bench.peers.flashinfer_decode import FlashInferDecode
from bench.peers.torch_sdpa import TorchSdpa
from bench.workloads import Case, Workload, make_workload

LEVELS = ("1,2,6", "7,4,5")
FOREST = ("2,4,8", "7,4,5")


class Cpu:
    """NumPy as the benchmark's device; it times nothing."""

    xp = np
    memory = 10**9

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)

    def time_cold(self, runs: Mapping[str, Any], repeats: int) -> dict[str, dict[str, float]]:
        raise NotImplementedError

    def time_graph(self, run: Any, repeats: int) -> float:
        raise NotImplementedError

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return self.memory

    def release(self) -> None:
        pass


def work(levels: tuple[str, str] = LEVELS, heads: tuple[int, int] = (4, 2)) -> Workload:
    return make_workload(Case("levels", *levels, *heads, 16), Cpu())


def ragged(tmp_path: Path) -> Workload:
    """Paths of 3, 5 and 9 tokens, the first two at inner levels."""
    path = tmp_path / "tree.txt"
    path.write_text("5\n-1 0 1 3\n0 1 2 0\n0 2 4 0\n0 3 4 1\n3 4 4 0\n", encoding="utf-8")
    return make_workload(Case("file", "", "", 4, 2, 16, "float16", str(path)), Cpu())


def assert_right(contestant: Contestant, workload: Workload) -> None:
    reference = Reference(workload, np.arange(workload.tree.batch_size))
    runs = contestant.prepare(workload)
    for label, run in runs.items():
        error, problem = reference.problem(run.call(), own=False)
        assert problem is None, f"{label}: {problem}"
        assert error > 0
    assert runs


@pytest.fixture
def flashinfer(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with FlashInfer's two wrappers, in plain torch."""

    def attend(q: Any, cache: Any, rows: Any, scale: float) -> tuple[Any, Any]:
        k, v = (part[rows.long(), 0].double() for part in cache)
        group = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(group, 1) for part in (k, v))
        scores = torch.einsum("rhd,thd->rht", q.double(), k) * scale
        lse = scores.logsumexp(2)
        return torch.einsum("rht,thd->rhd", (scores - lse[:, :, None]).exp(), v), lse

    class Decode:
        def __init__(self, workspace: Any, layout: str, use_tensor_cores: bool) -> None:
            assert layout == "NHD"

        def plan(
            self,
            indptr: Any,
            indices: Any,
            last_page_len: Any,
            *heads: int,
            page_size: int,
            q_data_type: Any,
            sm_scale: float,
        ) -> None:
            assert page_size == 1
            assert (last_page_len == 1).all()
            assert len(indices) == indptr[-1]
            self.indptr, self.indices, self.scale = indptr.tolist(), indices, sm_scale

        def run(self, q: Any, cache: Any, out: Any) -> None:
            for r, (start, stop) in enumerate(zip(self.indptr, self.indptr[1:], strict=False)):
                out[r] = attend(q[r : r + 1], cache, self.indices[start:stop], self.scale)[0][0]

    class Cascade:
        def __init__(self, num_levels: int, workspace: Any, layout: str) -> None:
            self.num_levels = num_levels

        def plan(
            self,
            qo: Any,
            kv: Any,
            indices: Any,
            last_page_len: Any,
            *heads: int,
            page_size: int,
            sm_scale: float,
            q_data_type: Any,
        ) -> None:
            assert len(qo) == len(kv) == len(indices) == len(last_page_len) == self.num_levels
            self.levels, self.scale = list(zip(qo, kv, indices, strict=True)), sm_scale

        def run(self, q: Any, cache: Any) -> Any:
            total, top = torch.zeros(q.shape).double(), torch.full(q.shape[:2], -torch.inf).double()
            for qo, kv, indices in self.levels:
                assert qo[-1] == len(q)
                for i in range(len(qo) - 1):
                    here = slice(qo[i], qo[i + 1])
                    part, lse = attend(q[here], cache, indices[kv[i] : kv[i + 1]], self.scale)
                    both = torch.logaddexp(top[here], lse)
                    old, new = (top[here] - both).exp(), (lse - both).exp()
                    total[here] = total[here] * old[:, :, None] + part * new[:, :, None]
                    top[here] = both
            return total.to(q.dtype)

    module = types.ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Decode  # type: ignore[attr-defined]
    module.MultiLevelCascadeAttentionWrapper = Cascade  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return module


@pytest.mark.parametrize("levels", [LEVELS, FOREST])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_flashinfer(flashinfer: Any, levels: tuple[str, str], heads: tuple[int, int]) -> None:
    assert_right(FlashInferDecode(), work(levels, heads))
    assert_right(FlashInferCascade(), work(levels, heads))


def test_flashinfer_on_a_ragged_tree(flashinfer: Any, tmp_path: Path) -> None:
    assert_right(FlashInferDecode(), ragged(tmp_path))
    with pytest.raises(UnsuitedError, match="same number of levels"):
        FlashInferCascade().prepare(ragged(tmp_path))


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_attention_over_one_cache_a_request(torch: Any, tmp_path: Path, heads: tuple[int, int]) -> None:
    for peer in (TorchSdpa(), DenseCupy()):
        assert_right(peer, work(FOREST, heads))
        assert_right(peer, ragged(tmp_path))


def test_caches_that_do_not_fit(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cpu, "memory", 1000)
    for peer in (TorchSdpa(), DenseCupy()):
        with pytest.raises(UnsuitedError, match="one cache a request takes"):
            peer.prepare(work())


ARTIFACT = """
import fasttree_cupy

def fasttree_decode(q, k, v, o, *rest):
    *indices, mid_o, mid_lse, nums, offsets, q_tiles, kv_tiles, scale = rest
    assert all((a[-128:] == -1).all() for a in indices)
    indices = [a[:-128] for a in indices]
    fasttree_cupy.fasttree_decode(q, k, v, o, *indices, mid_o, mid_lse, nums, offsets, q_tiles, kv_tiles, scale)
"""


@pytest.mark.parametrize("levels", [LEVELS, FOREST])
def test_triton_kernels(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: tuple[str, str]) -> None:
    monkeypatch.setattr("fasttree_cupy.preparation.resolve_device", lambda _: "cpu")
    monkeypatch.setattr("bench.peers.fasttree_triton.torch_problem", lambda: None)
    (tmp_path / "fasttree.py").write_text(ARTIFACT, encoding="utf-8")
    peer = FastTreeTriton(tmp_path)
    assert peer.problem() is None
    assert_right(peer, work(levels))


def test_triton_kernels_are_kept_from_int32_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.peers.fasttree_triton.INT32_ELEMENTS", 100)
    with pytest.raises(UnsuitedError, match="int32"):
        FastTreeTriton(None).prepare(work())
