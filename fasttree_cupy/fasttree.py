"""The module name of the API reference: ``from fasttree_cupy.fasttree import ...``."""

from fasttree_cupy.decode import fasttree_decode
from fasttree_cupy.metadata import MetadataTuple
from fasttree_cupy.params import FastTreeParams
from fasttree_cupy.preparation import fasttree_preparation

__all__ = ["FastTreeParams", "MetadataTuple", "fasttree_decode", "fasttree_preparation"]
