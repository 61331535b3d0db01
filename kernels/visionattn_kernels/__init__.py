"""The attention operators behind visionattn, usable without it: torch in, torch out, one kernel a device."""

from visionattn_kernels.op import OPS, Operator
from visionattn_kernels.ops.neighborhood_attention import neighborhood_attention

__all__ = ["OPS", "Operator", "neighborhood_attention"]
