"""What we compare ourselves with, a file each. Frameworks are imported only when a peer is asked for its problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bench.contestants import Contestant
from bench.peers.dense_cupy import DenseCupy
from bench.peers.fasttree_triton import FastTreeTriton
from bench.peers.flashinfer_cascade import FlashInferCascade
from bench.peers.flashinfer_decode import FlashInferDecode
from bench.peers.torch_sdpa import TorchSdpa

__all__ = ["PEERS"]

PEERS: Mapping[str, Callable[[Path | None], Contestant]] = {
    "fasttree_triton": FastTreeTriton,
    "flashinfer_cascade": lambda _: FlashInferCascade(),
    "flashinfer_decode": lambda _: FlashInferDecode(),
    "torch_sdpa": lambda _: TorchSdpa(),
    "dense_cupy": lambda _: DenseCupy(),
}
"""Name -> how to make it, given the folder of the FastTree artifact."""
