"""Modules with several callers that timm's layers lack."""

from visionattn.layers.block import AttentionBlock
from visionattn.layers.neighborhood import NeighborhoodAttention

__all__ = ["AttentionBlock", "NeighborhoodAttention"]
