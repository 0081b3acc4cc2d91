"""Rewrite a transformers decoder into fused operators and merged projections when it is loaded."""

from .operations import layer_operations
from .proof import Proof
from .rewriting import Fusion, fuse_model

__all__ = ["Fusion", "Proof", "fuse_model", "layer_operations"]
