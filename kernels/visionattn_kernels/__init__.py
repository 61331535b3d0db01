"""The attention operators behind visionattn, usable without it: torch in, torch out, one kernel a device."""

from visionattn_kernels.op import OPS, Operator
from visionattn_kernels.ops.flow_attention import flow_attention
from visionattn_kernels.ops.halo_attention import halo_attention
from visionattn_kernels.ops.linear_attention import linear_attention
from visionattn_kernels.ops.neighborhood_aggregate import neighborhood_aggregate
from visionattn_kernels.ops.neighborhood_attention import neighborhood_attention
from visionattn_kernels.ops.routed_attention import region_routes, routed_attention

__all__ = [
    "OPS",
    "Operator",
    "flow_attention",
    "halo_attention",
    "linear_attention",
    "neighborhood_aggregate",
    "neighborhood_attention",
    "region_routes",
    "routed_attention",
]
