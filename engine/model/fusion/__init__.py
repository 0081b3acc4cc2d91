"""Rewrite a transformers decoder into fused operators and merged projections when it is loaded."""

from .rewriting import Fusion, fuse_model

__all__ = ["Fusion", "fuse_model"]
