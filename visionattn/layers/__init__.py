"""Modules that are no family's own and that timm's layers lack."""

from visionattn.layers.block import AttentionBlock
from visionattn.layers.conv import DepthwiseConv, GroupedLinear, conv_each, fill_patch, pad_to_multiple, zero_pad
from visionattn.layers.ela import ELA
from visionattn.layers.neighborhood import NeighborhoodAttention
from visionattn.layers.ulsam import ULSAM, merge_subspaces

__all__ = [
    "ELA",
    "ULSAM",
    "AttentionBlock",
    "DepthwiseConv",
    "GroupedLinear",
    "NeighborhoodAttention",
    "conv_each",
    "fill_patch",
    "merge_subspaces",
    "pad_to_multiple",
    "zero_pad",
]
