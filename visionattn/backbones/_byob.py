"""timm's ByobNet as a base: ResNets whose stages are lists of blocks, with features of strides 4 to 32."""

from functools import partial

import torch
from timm.models import named_apply
from timm.models.byobnet import ByobNet, _init_weights


class Byob(ByobNet):
    """timm's ByobNet without the stem's feature, and with weights that can be drawn anew.

    Args:
        zero_init_last: Whether the last norm of each residual path begins with zeros.
        **kwargs: As for timm's `ByobNet`.
    """

    def __init__(self, zero_init_last: bool = True, **kwargs):
        super().__init__(zero_init_last=zero_init_last, **kwargs)
        self.zero_init_last = zero_init_last
        # timm counts the stem's stride 2 as a feature; ours are those of every backbone here.
        self.feature_info, self.stage_ends = self.feature_info[1:], self.stage_ends[1:]

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights anew by timm's rules."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        named_apply(partial(_init_weights, zero_init_last=self.zero_init_last), self)
