"""Modules with several callers that timm's layers lack."""

from visionattn.layers.block import AttentionBlock
from visionattn.layers.conv import DepthwiseConv
from visionattn.layers.neighborhood import NeighborhoodAttention

__all__ = ["AttentionBlock", "DepthwiseConv", "NeighborhoodAttention"]
