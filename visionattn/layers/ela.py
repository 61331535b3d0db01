"""Efficient local attention (Xu and Wan, 2024, arXiv:2403.01123)."""

from torch import Tensor, nn

# Kernel, channels of a group of the convolution, groups of the norm. By cost the order is t, b, s, l.
VARIANTS = {"t": (5, 1, 32), "b": (7, 1, 16), "s": (5, 8, 16), "l": (7, 8, 16)}


class ELA(nn.Module):
    """Gate every position by its row and its column, x * gate_rows * gate_columns (arXiv:2403.01123).

    A gate is sigmoid(group_norm(conv1d(mean))), of the means of the rows and of the columns. There is no code of the
    authors; the settings are those on which public copies agree. timm's layer `ela` is something else: separate
    convolutions, one group in the norm, and another activation before the sigmoid.

    It keeps the shape and serves as `attn_layer` of timm's models: `functools.partial(ELA, variant="s")`.

    Args:
        dim: Channels C; the groups of the convolution and of the norm must divide them.
        variant: "t", "b", "s" or "l".
        shared: Whether rows and columns share their convolution, as in all public copies. The paper's formulas can be
            read as two, with one norm.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Raises:
        ValueError: There is no such variant, or `dim` does not fit it.
    """

    def __init__(self, dim: int, variant: str = "b", shared: bool = True, device=None, dtype=None):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        kernel_size, width, norm_groups = VARIANTS[variant]
        if dim % norm_groups:
            raise ValueError(f"dim must be a multiple of {norm_groups} for variant {variant!r}, got {dim}")
        dd = {"device": device, "dtype": dtype}
        convs = [
            nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim // width, bias=False, **dd)
            for _ in range(1 if shared else 2)
        ]
        # A list, since one module under two names would stand twice in a state dict, which safetensors refuses.
        self.convs = nn.ModuleList(convs)
        self.norm = nn.GroupNorm(norm_groups, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        rows = self.norm(self.convs[0](x.mean(3))).sigmoid()
        columns = self.norm(self.convs[-1](x.mean(2))).sigmoid()
        return x * rows.unsqueeze(3) * columns.unsqueeze(2)
