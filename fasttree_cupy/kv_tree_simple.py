"""The module name that the API reference uses for tree nodes and tree files."""

from __future__ import annotations

from fasttree_cupy.tree import KVTreeNode, retrive_from_file, write_tree_to_file

__all__ = ["KVTreeNode", "retrive_from_file", "write_tree_to_file"]
