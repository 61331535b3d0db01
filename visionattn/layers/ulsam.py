"""Ultra-lightweight subspace attention (ULSAM: Ultra-Lightweight Subspace Attention Module, WACV 2020)."""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ULSAM(nn.Module):
    """Weigh each of several groups of channels with one map of its own, x + softmax(...) * x (arXiv:2006.15102).

    The map is softmax over all positions of relu(norm(point(max_pool(relu(norm(depthwise(x))))))), with convolutions of
    1x1 and a pool of 3x3. This is Nandan91/ULSAM at 9a07d68; the paper's figure and its count of 2 * dim parameters
    know neither the norms nor the activations. All groups are computed at once where the authors loop over them.

    It keeps the shape, so that it stands in for a block or behind one, and it serves as `attn_layer` of timm's models.

    Args:
        dim: Channels C.
        num_subspaces: Groups of channels; `dim` must be a multiple.
        momentum: Of the batch norms' running statistics, in torch's sense. The authors' 0.9 forgets almost all but the
            last batch; it was probably meant to be 0.1.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Raises:
        ValueError: `dim` is no multiple of `num_subspaces`.
    """

    def __init__(self, dim: int, num_subspaces: int = 4, momentum: float = 0.9, device=None, dtype=None):
        super().__init__()
        if num_subspaces < 1 or dim % num_subspaces:
            raise ValueError(f"dim must be a multiple of num_subspaces, got dim={dim}, num_subspaces={num_subspaces}")
        dd = {"device": device, "dtype": dtype}
        self.num_subspaces = num_subspaces
        self.conv_dws = nn.Conv2d(dim, dim, 1, groups=dim, **dd)
        self.bn_dws = nn.BatchNorm2d(dim, momentum=momentum, **dd)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.conv_point = nn.Conv2d(dim, num_subspaces, 1, groups=num_subspaces, **dd)
        self.bn_point = nn.BatchNorm2d(num_subspaces, momentum=momentum, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        scores = self.pool(self.act(self.bn_dws(self.conv_dws(x))))
        scores = self.act(self.bn_point(self.conv_point(scores)))
        attention = scores.flatten(2).softmax(-1).view(scores.shape)
        return x + attention.repeat_interleave(x.shape[1] // self.num_subspaces, dim=1) * x


def merge_subspaces(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the authors' tensors `subspaces.0.conv_dws.weight`, `subspaces.1...` to ours; others pass unchanged."""
    merged, parts = {}, defaultdict(dict)
    for name, x in state_dict.items():
        found = re.search(r"(?:^|(?<=\.))subspaces\.(\d+)\.", name)
        if found:
            parts[name[: found.start()] + name[found.end() :]][int(found[1])] = x
        else:
            merged[name] = x
    for name, tensors in parts.items():
        ordered = [tensors[i] for i in sorted(tensors)]
        # The counters of batch norms are scalars, and equal.
        merged[name] = torch.cat(ordered) if ordered[0].ndim else ordered[0]
    return merged
