"""HaloNet: ResNets whose blocks attend from squares of the map to the squares and a halo around them.

Scaling Local Self-Attention for Parameter Efficient Visual Backbones (Vaswani et al., CVPR 2021, arXiv:2103.12731). The
authors published no code. H0 to H7 follow the paper's table, as keras_cv_attention_models gives it, with four heads in
the first stage where timm's halonet_h1 has eight; the designs with weights are timm's, checked against timm 1.0.31 and
with its names. Both are timm's ByobNet with our attention: timm refuses maps that its blocks do not divide, ours goes
on with zeros as at the border, so that any size works.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import make_divisible
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.models import PretrainedCfg, generate_default_cfgs, register_model, register_notrace_module
from timm.models.byoanet import model_cfgs
from timm.models.byobnet import ByoBlockCfg, ByoModelCfg, LayerFn, SelfAttnBlock
from torch import Tensor, nn

from visionattn.backbones._byob import Byob
from visionattn.checkpoint import translate
from visionattn.registry import build, cfg
from visionattn_kernels import halo_attention


@register_notrace_module  # the operator checks sizes, which fx cannot trace
class HaloAttention(HaloAttn):
    """timm's halo attention, its names and its numbers, for maps of any size.

    Args:
        dim: Channels of the input.
        value_ratio: Channels of the values, and so of the output, as a multiple of `dim`.
        num_heads: Heads.
        dim_head: Channels of a head's queries and keys, by default `dim // num_heads`.
        **kwargs: As for timm's `HaloAttn`: stride, block_size, halo_size, qkv_bias, device, dtype.
    """

    def __init__(self, dim: int, value_ratio: float = 1.0, num_heads: int = 8, dim_head: int | None = None, **kwargs):
        dim_head = dim_head or make_divisible(dim) // num_heads
        super().__init__(dim, int(dim * value_ratio), num_heads=num_heads, dim_head=dim_head, **kwargs)
        if self.block_size % self.block_stride or not isinstance(self.pool, nn.Identity):
            raise ValueError(f"block_size must be a multiple of stride, got block_size={self.block_size}")

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, H, W) to (B, dim * value_ratio, H / stride, W / stride), odd sides rounded up."""
        query = self.q(x).unflatten(1, (self.num_heads, self.dim_head_qk)).permute(0, 1, 3, 4, 2)
        keys_values = self.kv(x).unflatten(1, (self.num_heads, self.dim_head_qk + self.dim_head_v))
        keys_values = keys_values.permute(0, 1, 3, 4, 2)
        key, value = keys_values[..., : self.dim_head_qk], keys_values[..., self.dim_head_qk :]
        height_rel, width_rel = self.pos_embed.height_rel.to(query.dtype), self.pos_embed.width_rel.to(query.dtype)
        if torch.jit.is_scripting():
            out, _ = torch.ops.visionattn.halo_attention(
                query,
                key,
                value,
                height_rel,
                width_rel,
                self.block_size,
                self.halo_size,
                self.block_stride,
                self.scale,
            )
        else:
            out = halo_attention(
                query,
                key,
                value,
                height_rel,
                width_rel,
                self.block_size,
                self.halo_size,
                stride=self.block_stride,
                scale=self.scale,
            )
        # Joining heads as the second axis would give a single image a stride of its own, which torch's batch norm takes
        # for another layout than it writes: its gradient is wrong.
        return out.permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)


@register_notrace_module  # the size of the map decides which relative positions there are
class GlobalAttention(BottleneckAttn):
    """timm's bottleneck attention, its names and its numbers, for maps of any size.

    Every position attends to all, with relative positions along both axes. The tables are made for one size of the map;
    differences that they do not hold take their last entry.

    Args:
        dim: Channels.
        feat_size: Size of the map that the tables are made for.
        **kwargs: As for timm's `BottleneckAttn`.
    """

    def __init__(self, dim: int, feat_size: tuple[int, int], **kwargs):
        super().__init__(dim, feat_size=feat_size, **kwargs)
        if isinstance(self.pool, nn.AvgPool2d):
            self.pool = nn.AvgPool2d(2, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, H, W) to (B, dim, H / stride, W / stride), odd sides rounded up."""
        height, width = x.shape[2], x.shape[3]
        parts = self.qkv(x).flatten(2).split([self.dim_out_qk, self.dim_out_qk, self.dim_out_v], dim=1)
        query, key, value = [part.unflatten(1, (self.num_heads, -1)).transpose(2, 3) for part in parts]
        by_row = relative(self.pos_embed.height_rel, height).to(query.dtype)
        by_column = relative(self.pos_embed.width_rel, width).to(query.dtype)
        q = query.unflatten(2, (height, width))
        rows = torch.einsum("bhijd,ird->bhijr", q, by_row)
        columns = torch.einsum("bhijd,jsd->bhijs", q, by_column)
        bias = (rows.unsqueeze(5) + columns.unsqueeze(4)).flatten(4, 5).flatten(2, 3)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
        return self.pool(out.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width)))


def relative(table: Tensor, length: int) -> Tensor:
    """The entries of a table of relative positions (2P-1, D) for each query and key of an axis: (length, length, D)."""
    place = torch.arange(length, device=table.device)
    reach = table.shape[0] // 2
    return table[(place - place[:, None]).clamp(-reach, reach) + reach]


class WideBlock(SelfAttnBlock):
    """timm's bottleneck block with attention, whose output may be wider than its input.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        layers: timm's layers.
        **kwargs: As for timm's `SelfAttnBlock`.
    """

    def __init__(self, in_chs: int, out_chs: int, layers: LayerFn, device=None, dtype=None, **kwargs):
        super().__init__(in_chs, out_chs, layers=layers, device=device, dtype=dtype, **kwargs)
        width = self.self_attn.dim_out_v
        self.post_attn = layers.norm_act(width, device=device, dtype=dtype)
        self.conv3_1x1 = layers.conv_norm_act(width, out_chs, 1, apply_act=False, device=device, dtype=dtype)


class HaloNet(Byob):
    """A HaloNet.

    Args:
        **kwargs: As for timm's `ByobNet`, with `cfg` its configuration. `img_size` is the size that tables of global
            attention are made for; it restricts nothing.
    """


def paper_cfg(
    block_size: int,
    halo_size: int,
    depth: int,
    value_ratio: float = 1.0,
    output_ratio: float = 1.0,
    num_features: int = 0,
) -> ByoModelCfg:
    """A configuration of the paper's table.

    Args:
        block_size: Side of the squares of queries, b.
        halo_size: Width of the halo, h.
        depth: Blocks of the third stage; the others have three.
        value_ratio: Width of the values as a multiple of that of queries and keys, r_v.
        output_ratio: Width of the blocks' output as a multiple of their attention's, r_b.
        num_features: Width of the last 1x1 convolution, d_f; 0 for none.
    """
    stages = [
        ByoBlockCfg(
            type=partial(WideBlock),
            d=blocks,
            c=int(dim * output_ratio),
            s=1 if dim == 64 else 2,
            gs=0,
            br=1 / output_ratio,
            self_attn_layer=HaloAttention,
            self_attn_kwargs={
                "block_size": block_size,
                "halo_size": halo_size,
                "value_ratio": value_ratio,
                "num_heads": 4 if dim == 64 else 8,
            },
        )
        for dim, blocks in zip((64, 128, 256, 512), (3, 3, depth, 3), strict=True)
    ]
    return ByoModelCfg(
        blocks=tuple(stages), stem_type="7x7", stem_pool="maxpool", stem_chs=64, num_features=num_features
    )


def timm_cfg(name: str) -> ByoModelCfg:
    """Timm's configuration with our attention in place of timm's."""
    ours = {"halo": HaloAttention, "bottleneck": GlobalAttention, None: None}
    config = model_cfgs[name]

    def swap(block: ByoBlockCfg) -> ByoBlockCfg:
        return replace(block, self_attn_layer=ours[block.self_attn_layer])

    stages = [tuple(map(swap, stage)) if isinstance(stage, Sequence) else swap(stage) for stage in config.blocks]
    return replace(config, blocks=tuple(stages), self_attn_layer=ours[config.self_attn_layer])


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Take timm's names, which are ours.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    return translate(state_dict, model, rules=(), headless=("head.", "final_conv."))


def _paper(size: int, **fields) -> PretrainedCfg:
    return cfg(
        source="https://arxiv.org/abs/2103.12731",
        paper="2103.12731",
        # There are no weights; the code is ours.
        license="apache-2.0",
        input_size=(3, size, size),
        pool_size=(-(-size // 32), -(-size // 32)),
        first_conv="stem.conv1.conv",
        **fields,
    )


def _timm(weights: str, **fields) -> PretrainedCfg:
    return cfg(
        source="https://github.com/huggingface/pytorch-image-models",
        paper="2103.12731",
        license="apache-2.0",
        hf_hub_id=f"timm/{weights}",
        input_size=(3, 256, 256),
        pool_size=(8, 8),
        first_conv="stem.conv1.conv",
        **({"crop_pct": 0.94} | fields),
    )


# Figures of the paper's models are the paper's but for the parameters, which are counted and round to the paper's;
# those of timm's designs are timm's.
default_cfgs = generate_default_cfgs(
    {
        "halonet_h0_va.untrained": _paper(256, top1=77.9, params=5502248),
        "halonet_h1_va.untrained": _paper(256, top1=79.9, params=8101352),
        "halonet_h2_va.untrained": _paper(256, top1=80.4, params=9405608),
        "halonet_h3_va.untrained": _paper(320, top1=81.9, params=11842792),
        "halonet_h4_va.untrained": _paper(384, top1=83.3, params=19103464),
        "halonet_h5_va.untrained": _paper(448, top1=84.0, params=30718952),
        "halonet_h6_va.untrained": _paper(512, top1=84.4, params=43458280),
        "halonet_h7_va.untrained": _paper(600, top1=84.9, params=67434728),
        "halonet26t_va.a1h_in1k": _timm("halonet26t.a1h_in1k", top1=79.13, params=12480288, gmacs=3.19, crop_pct=0.95),
        "sehalonet33ts_va.ra2_in1k": _timm("sehalonet33ts.ra2_in1k", top1=80.98, params=13691712, gmacs=3.55),
        "halonet50ts_va.a1h_in1k": _timm("halonet50ts.a1h_in1k", top1=81.64, params=22733280, gmacs=5.3),
        "eca_halonext26ts_va.c1_in1k": _timm("eca_halonext26ts.c1_in1k", top1=79.52, params=10756885, gmacs=2.44),
        "halo2botnet50ts_256_va.a1h_in1k": _timm(
            "halo2botnet50ts_256.a1h_in1k", top1=82.08, params=22635360, gmacs=5.02, crop_pct=0.95
        ),
        "test_halonet.untrained": _paper(96),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict, config: ByoModelCfg, **settings) -> HaloNet:
    return build(HaloNet, variant, pretrained, checkpoint_filter_fn, model_cfg=config, **(settings | kwargs))


@register_model
def halonet_h0_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H0."""
    return _create("halonet_h0_va", pretrained, kwargs, paper_cfg(8, 3, 7, output_ratio=0.5))


@register_model
def halonet_h1_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H1."""
    return _create("halonet_h1_va", pretrained, kwargs, paper_cfg(8, 3, 10))


@register_model
def halonet_h2_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H2."""
    return _create("halonet_h2_va", pretrained, kwargs, paper_cfg(8, 3, 11, output_ratio=1.25))


@register_model
def halonet_h3_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H3."""
    return _create("halonet_h3_va", pretrained, kwargs, paper_cfg(10, 3, 12, output_ratio=1.5, num_features=1024))


@register_model
def halonet_h4_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H4."""
    return _create("halonet_h4_va", pretrained, kwargs, paper_cfg(12, 2, 12, output_ratio=3.0, num_features=1280))


@register_model
def halonet_h5_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H5."""
    return _create(
        "halonet_h5_va", pretrained, kwargs, paper_cfg(14, 2, 23, value_ratio=2.5, output_ratio=2.0, num_features=1536)
    )


@register_model
def halonet_h6_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H6."""
    return _create(
        "halonet_h6_va", pretrained, kwargs, paper_cfg(8, 4, 24, value_ratio=3.0, output_ratio=2.75, num_features=1536)
    )


@register_model
def halonet_h7_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H7."""
    return _create(
        "halonet_h7_va", pretrained, kwargs, paper_cfg(10, 3, 26, value_ratio=4.0, output_ratio=3.5, num_features=2048)
    )


@register_model
def halonet26t_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """The design halonet26t of timm: a ResNet-26-T with halo attention in the last two stages."""
    return _create("halonet26t_va", pretrained, kwargs, timm_cfg("halonet26t"))


@register_model
def sehalonet33ts_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """The design sehalonet33ts of timm: ResNet-33-TS with SE, and halo attention in three stages."""
    return _create("sehalonet33ts_va", pretrained, kwargs, timm_cfg("sehalonet33ts"))


@register_model
def halonet50ts_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """The design halonet50ts of timm: a ResNet-50-TS with halo attention in three stages."""
    return _create("halonet50ts_va", pretrained, kwargs, timm_cfg("halonet50ts"))


@register_model
def eca_halonext26ts_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """The design eca_halonext26ts of timm: a ResNeXt-26-TS with ECA, and halo attention in the last two stages."""
    return _create("eca_halonext26ts_va", pretrained, kwargs, timm_cfg("eca_halonext26ts"))


@register_model
def halo2botnet50ts_256_va(pretrained: bool = False, **kwargs) -> HaloNet:
    """The design halo2botnet50ts_256 of timm: halo attention in two stages, global attention in the last."""
    return _create("halo2botnet50ts_256_va", pretrained, kwargs, timm_cfg("halo2botnet50ts"), img_size=256)


@register_model
def test_halonet(pretrained: bool = False, **kwargs) -> HaloNet:
    """A HaloNet small enough to test everything in seconds."""
    halo = {"self_attn_layer": HaloAttention, "self_attn_kwargs": {"block_size": 4, "halo_size": 1, "num_heads": 2}}
    wide = halo | {"self_attn_kwargs": halo["self_attn_kwargs"] | {"value_ratio": 1.5}}
    bottleneck = {"self_attn_layer": GlobalAttention, "self_attn_kwargs": {"num_heads": 2}}
    blocks = (
        ByoBlockCfg(type="bottle", d=1, c=32, s=1, gs=0, br=0.5),
        ByoBlockCfg(type="self_attn", d=2, c=48, s=2, gs=0, br=0.5, **halo),
        ByoBlockCfg(type=partial(WideBlock), d=1, c=64, s=2, gs=0, br=0.5, **wide),
        ByoBlockCfg(type="self_attn", d=1, c=64, s=2, gs=0, br=0.5, **bottleneck),
    )
    config = ByoModelCfg(blocks=blocks, stem_type="7x7", stem_pool="maxpool", stem_chs=16, num_features=80)
    return _create("test_halonet", pretrained, kwargs, config, img_size=96, zero_init_last=False)
