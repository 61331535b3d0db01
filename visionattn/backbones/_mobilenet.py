"""timm's MobileNets as hosts of attention modules, with features of strides 4 to 32."""

from collections.abc import Sequence

import torch
from timm.models._efficientnet_builder import decode_arch_def, efficientnet_init_weights
from timm.models.efficientnet import EfficientNet
from torch import nn

MOBILENET_V1 = (
    "dsa_r1_k3_s1_c64",
    "dsa_r2_k3_s2_c128",
    "dsa_r2_k3_s2_c256",
    "dsa_r6_k3_s2_c512",
    "dsa_r2_k3_s2_c1024",
)
MOBILENET_V2 = (
    "ds_r1_k3_s1_c16",
    "ir_r2_k3_s2_e6_c24",
    "ir_r3_k3_s2_e6_c32",
    "ir_r4_k3_s2_e6_c64",
    "ir_r3_k3_s1_e6_c96",
    "ir_r3_k3_s2_e6_c160",
    "ir_r1_k3_s1_e6_c320",
)
# What lies behind the features, which detectors and segmenters leave out.
HEADLESS = ("head.", "conv_head.", "bn2.")


class MobileNet(EfficientNet):
    """A MobileNet without the stem's feature, whose weights can be drawn anew.

    Args:
        stages: timm's description of each stage.
        **kwargs: As for timm's `EfficientNet`.
    """

    # Modules of this type keep torch's own initialisation.
    attention: type[nn.Module]

    def __init__(self, stages: Sequence[str], **kwargs):
        super().__init__(decode_arch_def([[stage] for stage in stages]), act_layer=nn.ReLU6, **kwargs)
        # timm counts the stem's stride 2 as a feature; ours are those of every backbone here.
        self.feature_info, self.stage_ends = self.feature_info[1:], self.stage_ends[1:]

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights anew: the host's by timm's rule, the attention's by torch's."""
        attention = {child for x in self.modules() if isinstance(x, self.attention) for child in x.children()}
        for module in self.modules():
            if hasattr(module, "reset_parameters") and module not in attention:
                module.reset_parameters()
        efficientnet_init_weights(self)
        for module in attention:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
