"""Rewrite a transformers decoder into fused operators and merged projections when it is loaded."""

from .operations import attention_layers, layer_operations
from .proof import Proof
from .rewriting import Fusion, fuse_model

__all__ = ["Fusion", "Proof", "attention_layers", "fuse_model", "layer_operations"]
