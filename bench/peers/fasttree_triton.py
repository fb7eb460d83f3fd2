"""The published FastTree Triton kernels (MLSys'25), from a local copy of the artifact's ``kernel_bench`` folder.

They run on the metadata that our preparation makes with the parameters of the published benchmark: the decode call is
what is compared. The time of their own preparation is not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contestants import KV_TILES, Contestant, Run, UnsuitedError, documented_plan, tiles_label
from bench.peers._torch import tensor, torch_problem
from bench.workloads import Workload

__all__ = ["FastTreeTriton"]

PADDING = 128
"""The kernels read index arrays past their ends, up to one KV tile; the published preparation pads them as well."""
INT32_ELEMENTS = 2**31


class FastTreeTriton(Contestant):
    """Both KV tile settings of the published benchmark.

    Parameters
    ----------
    folder : Path or None
        The artifact's ``kernel_bench`` folder.
    """

    name = "fasttree_triton"

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._module: Any = None

    def problem(self) -> str | None:
        """Why the kernels cannot be loaded."""
        if self.folder is None:
            return "no --fasttree-artifact was given, the artifact's kernel_bench folder"
        path = self.folder / "fasttree.py"
        if not path.is_file():
            return f"{path} is missing"
        problem = torch_problem()
        if problem is not None:
            return problem
        try:
            self._module = _load(path)
        except ImportError as error:
            return f"{path} cannot be imported ({error})"
        return None

    def prepare(self, workload: Workload) -> dict[str, Run]:
        """One run for each of ``KV_TILES``."""
        if workload.k.size >= INT32_ELEMENTS:
            raise UnsuitedError("its offsets into K and V are int32, which this many tokens overflow")
        return {tiles_label(tiles): self._run(workload, tiles) for tiles in KV_TILES}

    def _run(self, workload: Workload, tiles: Sequence[int]) -> Run:
        metadata, params = documented_plan(workload, tiles)
        if metadata.mid_o.size >= INT32_ELEMENTS:
            raise UnsuitedError("its offsets into the partial outputs are int32, which this plan overflows")
        output = workload.new_output()
        xp = workload.device.xp
        padding = xp.full(PADDING, -1, xp.int32)
        arrays = [xp.concatenate([array, padding]) for array in metadata[:9]]
        arrays += [workload.q, workload.k, workload.v, output, *metadata[9:11]]
        *indices, q, k, v, o, mid_o, mid_lse = map(tensor, arrays)
        phases = (list(metadata.phase_node_nums), list(metadata.phase_node_offsets))
        arguments = (q, k, v, o, *indices, mid_o, mid_lse, *phases, params.TSQs, params.TSKs, workload.sm_scale)

        def call() -> Any:
            self._module.fasttree_decode(*arguments)
            return output

        return Run(call, graph=True)


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("fasttree_artifact", path)
    if spec is None or spec.loader is None:
        raise ImportError("no loader for this file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
