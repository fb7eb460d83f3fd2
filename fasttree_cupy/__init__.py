"""Attention over tree-shaped KV caches: FastTree (MLSys'25) for any array framework, on CUDA and on the CPU."""

from fasttree_cupy.capacity import Capacity
from fasttree_cupy.decode import fasttree_decode
from fasttree_cupy.merging import merge_states
from fasttree_cupy.metadata import MetadataTuple
from fasttree_cupy.params import PRESETS, FastTreeParams, GpuPreset, preset
from fasttree_cupy.plan import DecodePlan, plan_decode
from fasttree_cupy.preparation import fasttree_preparation
from fasttree_cupy.tree import KVTree, KVTreeNode, fill_requests, retrive_from_file, write_tree_to_file
from fasttree_cupy.workload import qkv_preparation

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Capacity",
    "DecodePlan",
    "FastTreeParams",
    "GpuPreset",
    "KVTree",
    "KVTreeNode",
    "MetadataTuple",
    "fasttree_decode",
    "fasttree_preparation",
    "fill_requests",
    "merge_states",
    "plan_decode",
    "preset",
    "qkv_preparation",
    "retrive_from_file",
    "write_tree_to_file",
]
