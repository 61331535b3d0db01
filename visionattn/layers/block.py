"""The residual block of most attention backbones."""

from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn


class AttentionBlock(nn.Module):
    """Attention, then an MLP, each behind a LayerNorm and on a residual path.

    x -> x + pos_embed(x) -> x + drop_path(scale(attn(norm(x)))) -> x + drop_path(scale(mlp(norm(x))))

    Works on (B, H, W, C).

    Args:
        dim: Channels C.
        attn: The attention module, (B, H, W, C) to the same shape.
        mlp_ratio: Hidden width of the MLP as a multiple of `dim`.
        proj_drop: Dropout inside the MLP.
        drop_path: Probability that a sample skips a residual path in training.
        layer_scale: Initial value of a trainable factor per channel on each residual path; None for no such factor.
        norm_eps: Epsilon of the LayerNorms.
        pos_embed: Position encoding by content, such as a depthwise convolution, added before attention; None for none.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
        pos_embed: nn.Module | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pos_embed = pos_embed
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
