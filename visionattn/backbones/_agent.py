"""The attention module of Agent Attention (Han et al., ECCV 2024, arXiv:2312.08874)."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn


@register_notrace_module  # the size of the map decides how biases are resized, which fx cannot trace
class AgentAttention(nn.Module):
    """Softmax from agents to tokens, then from tokens to agents, plus a depthwise 3x3 convolution of the values.

    Args:
        dim: Channels C.
        num_heads: Heads; `dim` must be a multiple.
        num_agents: Agents; their grid has floor(sqrt(num_agents)) a side.
        side: Side of the map to which the biases of rows and columns belong.
        class_token: Whether a class token comes before the map.
        proj_drop: Dropout after the output projection.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_agents: int,
        side: int,
        class_token: bool = False,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.class_token = class_token
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.set_tables(num_agents, side)

    @torch.jit.ignore
    def set_tables(self, num_agents: int, side: int) -> None:
        """Make bias tables for another number of agents."""
        heads, dd = self.num_heads, {"device": self.qkv.weight.device, "dtype": self.qkv.weight.dtype}
        self.grid = int(num_agents**0.5)
        self.shape = [self.grid, self.grid]
        shapes = {
            "an_bias": (heads, num_agents, 7, 7),
            "na_bias": (heads, num_agents, 7, 7),
            "ah_bias": (heads, num_agents, side, 1),
            "aw_bias": (heads, num_agents, 1, side),
            "ha_bias": (heads, side, 1, num_agents),
            "wa_bias": (heads, 1, side, num_agents),
        }
        if self.class_token:
            shapes |= {"ac_bias": (1, heads, num_agents, 1), "ca_bias": (1, heads, 1, num_agents)}
        self.ac_bias = self.ca_bias = None
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, **dd)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the biases from a truncated normal distribution of deviation 0.02."""
        for table in self.parameters(recurse=False):
            trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        return self.attend(x.flatten(1, 2), x.shape[1], x.shape[2]).view(x.shape)

    def attend(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, N, C), of which the last H W are a map, to the same shape."""
        batch, tokens, dim = x.shape
        first = tokens - height * width
        # Cut along the channels, the three gradients join in one copy; as slices of a stack they would be copied twice.
        parts = self.qkv(x).chunk(3, dim=-1)
        query, key, value = [part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts]
        # A view, since pooling keeps its input.
        grid = parts[0][:, first:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
        agents = F.adaptive_avg_pool2d(grid, self.shape).flatten(2).unflatten(1, (self.num_heads, -1))
        agents = agents.transpose(2, 3) * self.scale
        gather, give = self.biases(height, width)
        gathered = (agents @ key.transpose(2, 3) + gather).softmax(-1).to(value.dtype) @ value
        out = (query @ agents.transpose(2, 3) + give).softmax(-1).to(value.dtype) @ gathered
        out = out.transpose(1, 2).reshape(batch, tokens, dim)
        local = self.dwc(parts[2][:, first:].transpose(1, 2).reshape(batch, dim, height, width))
        local = local.flatten(2).transpose(1, 2)
        if first > 0:
            local = F.pad(local, (0, 0, first, 0))
        return self.proj_drop(self.proj(out + local))

    def biases(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """What is added to the scores of agents for tokens (heads, A, N) and of tokens for agents (heads, N, A)."""
        gather = self._fit(self.an_bias, self.ah_bias + self.aw_bias, height, width)
        rows_and_columns = (self.ha_bias + self.wa_bias).permute(0, 3, 1, 2)
        give = self._fit(self.na_bias, rows_and_columns, height, width).transpose(1, 2)
        if self.ac_bias is not None and self.ca_bias is not None:
            gather = torch.cat([self._fit_agents(self.ac_bias[0]), gather], 2)
            give = torch.cat([self._fit_agents(self.ca_bias[0].transpose(1, 2)).transpose(1, 2), give], 1)
        return gather, give

    def _fit(self, blocks: Tensor, lines: Tensor, height: int, width: int) -> Tensor:
        """Both tables (heads, A, ...) at the size of the map, summed: (heads, A', H W)."""
        table = F.interpolate(blocks, [height, width], mode="bilinear")
        if lines.shape[2] != height or lines.shape[3] != width:
            lines = F.interpolate(lines, [height, width], mode="bilinear")
        return self._fit_agents((table + lines).flatten(2))

    def _fit_agents(self, table: Tensor) -> Tensor:
        """The table (heads, A, N) for the agents' present grid."""
        if self.shape[0] == self.grid and self.shape[1] == self.grid:
            return table
        grid = table.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return F.interpolate(grid, self.shape, mode="bilinear").flatten(2).transpose(1, 2)


class TokenAgentAttention(AgentAttention):
    """The same on a class token and the tokens of a map; agents come from the map alone."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, 1 + H W, C) to the same shape."""
        return self.attend(x, height, width)
