"""Agent Attention: a few agents, pooled from the queries, gather from all tokens and give to all tokens.

Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., ECCV 2024, arXiv:2312.08874). Checked
against LeapLabTHU/Agent-Attention at 207ce3e, from which names differ, and PVT's two projections are one here. Biases
follow the map to any size, as in the authors' dense models; their classifiers take one size.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones import _cswin, _deit, _pvt, _swin
from visionattn.backbones._agent import AgentAttention, TokenAgentAttention
from visionattn.backbones._linear import TINIEST, adapt, square, trunk_cfg
from visionattn.checkpoint import translate
from visionattn.registry import build


class _Agents:
    """What the four families share.

    Args:
        num_agents: Agents of each stage.
        agent_shapes: Rows and columns of the agents at each stage: "classification" as trained, "dense" as the authors
            detect and segment with the same weights, or pairs. With any but the first, every other window of Swin is
            shifted, though one covers the map. No weight depends on it.
        img_size, **kwargs: As of `LinearTrunk`.

    Raises:
        ValueError: As of `set_agent_shapes`.
    """

    attention = AgentAttention
    presets: ClassVar[Mapping[str, Sequence]] = {}

    def __init__(self, num_agents=(9, 16, 49, 49), agent_shapes="classification", img_size: int = 224, **kwargs):
        settings = [
            {"num_agents": number, "side": square(img_size) // reduction}
            for number, reduction in zip(num_agents, self.reductions, strict=True)
        ]
        super().__init__(attention_settings=settings, img_size=img_size, **kwargs)
        self.set_agent_shapes(agent_shapes)

    @torch.jit.ignore
    def set_agent_shapes(self, agent_shapes: str | Sequence[Sequence[int]]) -> None:
        """Choose the agents' rows and columns anew, as at construction.

        Raises:
            ValueError: `agent_shapes` names no preset or does not fit the stages.
        """
        trained = agent_shapes == "classification"
        if isinstance(agent_shapes, str) and not trained:
            if agent_shapes not in self.presets:
                known = ["classification", *self.presets]
                raise ValueError(f"agent_shapes must be one of {known} or pairs, got {agent_shapes!r}")
            agent_shapes = self.presets[agent_shapes]
        if not trained and len(agent_shapes) != len(self.stages):
            raise ValueError(f"agent_shapes must have {len(self.stages)} pairs, got {agent_shapes!r}")
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                if isinstance(block.attn, AgentAttention):
                    block.attn.shape = [block.attn.grid] * 2 if trained else list(agent_shapes[i])
                elif hasattr(block.attn, "always_shift"):
                    block.attn.always_shift = not trained


class AgentDeiT(_Agents, _deit.DeiT):
    """Agent Attention on DeiT."""

    attention = staticmethod(partial(TokenAgentAttention, class_token=True))

    def __init__(self, num_agents=(49, 49, 49, 49), **kwargs):
        super().__init__(num_agents=num_agents, **kwargs)


class AgentPVT(_Agents, _pvt.PVT):
    """Agent Attention on PVT."""

    presets: ClassVar[Mapping[str, Sequence]] = {"dense": ((12, 12), (16, 16), (28, 28), (28, 28))}


class AgentSwin(_Agents, _swin.Swin):
    """Agent Attention on Swin."""

    presets: ClassVar[Mapping[str, Sequence]] = {"dense": ((9, 9), (12, 12), (14, 14), (7, 7))}


class AgentCSWin(_Agents, _cswin.CSWin):
    """Agent Attention on CSWin."""


def adapt_agents(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """As `adapt`; and give blocks of the model as many agents as the checkpoint has."""
    for name, module in model.named_modules():
        table = state_dict.get(f"{name}.an_bias", state_dict.get(f"{name}.attns.0.an_bias"))
        fits = isinstance(module, AgentAttention) and table is not None and table.ndim == 4
        if fits and table.shape[1] != module.an_bias.shape[1]:
            module.set_tables(table.shape[1], module.ah_bias.shape[2])
    return adapt(state_dict, model)


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Map the authors' names to ours, fit agents and tables to the model; ours pass unchanged.

    Raises:
        ValueError: The checkpoint is of another model, which then keeps the agents that it had.
    """
    agents = [x for x in model.modules() if isinstance(x, AgentAttention)]
    before = {x: (x.grid, x.shape, dict(x.named_parameters(recurse=False))) for x in agents}
    try:
        return translate(state_dict, model, model.rules, drop=_swin.DROP, adapt=adapt_agents)
    except ValueError:
        for module, (grid, shape, tables) in before.items():
            module.grid, module.shape = grid, shape
            for name, table in tables.items():
                setattr(module, name, table)
        raise


_cfg = partial(trunk_cfg, source="https://github.com/LeapLabTHU/Agent-Attention", paper="2312.08874")
_deit_cfg = partial(_cfg, tokens=True)

default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.in1k": _deit_cfg("57e0904221824ee7b7af", top1=74.9, params=6015640, gmacs=1.2),
        "agent_deit_small.in1k": _deit_cfg("fdd43304372541db8ea7", top1=80.5, params=22647112, gmacs=4.4),
        "agent_deit_base.in1k": _deit_cfg("5115f15fdd7e4ab58fbc", top1=82.0, params=87204904, gmacs=17.6),
        "agent_deit_small_448.in1k": _deit_cfg("a228f86241c445f1969b", 448, top1=83.1, params=23070472, gmacs=17.7),
        "agent_pvt_tiny.in1k": _cfg("13fdf0e0a7c5498c934f", top1=78.4, params=11570352, gmacs=2.0),
        "agent_pvt_small.in1k": _cfg("36b8be9a8863456685a3", top1=82.2, params=20635066, gmacs=4.0),
        "agent_pvt_medium.in1k": _cfg("4d00ecacf18b45f9b88c", top1=83.4, params=35921746, gmacs=7.0),
        "agent_pvt_large.in1k": _cfg("040cfe0cfbbe4762ad09", top1=83.7, params=48738180, gmacs=10.4),
        "agent_pvt_medium_256.in1k": _cfg("654df734121643b19c52", 256, top1=83.8, params=36083682, gmacs=9.2),
        "agent_swin_tiny.in1k": _cfg("a2ddc1190c224f768a41", top1=82.6, params=28902964, gmacs=4.5),
        "agent_swin_small.in1k": _cfg("f607172c9fea4d6e99bb", top1=83.7, params=49666684, gmacs=8.7),
        "agent_swin_base.in1k": _cfg("4fcd2d0114bb490483c3", top1=84.0, params=88095096, gmacs=15.4),
        "agent_swin_small_288.in1k": _cfg(
            "09760394e93b4046a25e", 288, crop=False, top1=84.1, params=49707964, gmacs=14.6
        ),
        "agent_swin_base_384.in1k": _cfg(
            "bb84ee9058954706a557", 384, crop=False, top1=84.9, params=88305016, gmacs=46.3
        ),
        "agent_cswin_tiny.in1k": _cfg("8c562a74441e46d5902b", top1=83.1, params=20458672, gmacs=4.3),
        "agent_cswin_small.in1k": _cfg("30eb8af675bc4b7a8747", top1=83.9, params=32814100, gmacs=6.8),
        "agent_cswin_base.in1k": _cfg("c8035b0839b2410c8c9f", top1=84.7, params=73249696, gmacs=14.9),
        "agent_cswin_base_384.in1k": _cfg("1239be0df44b47719432", 384, top1=85.8, params=73328416, gmacs=46.3),
        "test_agent_deit.untrained": _deit_cfg(size=96),
        "test_agent_pvt.untrained": _cfg(size=96),
        "test_agent_swin.untrained": _cfg(size=96),
        "test_agent_cswin.untrained": _cfg(size=96),
    }
)

_DEIT_S = {"dims": 384, "num_heads": 6, "drop_path_rate": 0.1}
_DEIT_B = {"dims": 768, "num_heads": 12, "linear_depths": (3, 1, 0, 0), "num_agents": (81,) * 4}
_PVT = {"dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8), "mlp_ratios": (8.0, 8.0, 4.0, 4.0)}
_PVT_M = _PVT | {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3}


def _create(family: type[nn.Module], variant: str, pretrained: bool, kwargs: dict, **settings) -> nn.Module:
    return build(family, variant, pretrained, checkpoint_filter_fn, **(settings | kwargs))


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-T."""
    return _create(AgentDeiT, "agent_deit_tiny", pretrained, kwargs, dims=192, num_heads=3, drop_path_rate=0.0)


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-S."""
    return _create(AgentDeiT, "agent_deit_small", pretrained, kwargs, **_DEIT_S)


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-B, of which only the first four blocks have agents."""
    return _create(AgentDeiT, "agent_deit_base", pretrained, kwargs, **_DEIT_B, drop_path_rate=0.3)


@register_model
def agent_deit_small_448(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-S at 448 px."""
    return _create(AgentDeiT, "agent_deit_small_448", pretrained, kwargs, **_DEIT_S, img_size=448)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-T."""
    return _create(AgentPVT, "agent_pvt_tiny", pretrained, kwargs, **_PVT, depths=(2, 2, 2, 2), drop_path_rate=0.1)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-S."""
    return _create(AgentPVT, "agent_pvt_small", pretrained, kwargs, **_PVT, depths=(3, 4, 6, 3), drop_path_rate=0.1)


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-M."""
    return _create(AgentPVT, "agent_pvt_medium", pretrained, kwargs, **_PVT_M)


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-L."""
    return _create(AgentPVT, "agent_pvt_large", pretrained, kwargs, **_PVT, depths=(3, 8, 27, 3), drop_path_rate=0.3)


@register_model
def agent_pvt_medium_256(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-M at 256 px."""
    return _create(AgentPVT, "agent_pvt_medium_256", pretrained, kwargs, **_PVT_M, img_size=256)


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-T."""
    return _create(AgentSwin, "agent_swin_tiny", pretrained, kwargs, **_swin.TINY, drop_path_rate=0.2)


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-S."""
    return _create(AgentSwin, "agent_swin_small", pretrained, kwargs, **_swin.SMALL, drop_path_rate=0.3)


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-B."""
    return _create(AgentSwin, "agent_swin_base", pretrained, kwargs, **_swin.BASE, drop_path_rate=0.5)


@register_model
def agent_swin_small_288(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-S at 288 px."""
    settings = _swin.SMALL | {"img_size": 288, "drop_path_rate": 0.3}
    return _create(AgentSwin, "agent_swin_small_288", pretrained, kwargs, **settings)


@register_model
def agent_swin_base_384(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-B at 384 px."""
    return _create(AgentSwin, "agent_swin_base_384", pretrained, kwargs, **_swin.BASE, img_size=384, drop_path_rate=0.5)


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSwin-T."""
    return _create(AgentCSWin, "agent_cswin_tiny", pretrained, kwargs, **_cswin.TINY, drop_path_rate=0.2)


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSwin-S."""
    return _create(AgentCSWin, "agent_cswin_small", pretrained, kwargs, **_cswin.SMALL, drop_path_rate=0.4)


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSwin-B."""
    return _create(AgentCSWin, "agent_cswin_base", pretrained, kwargs, **_cswin.BASE, drop_path_rate=0.5)


@register_model
def agent_cswin_base_384(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSwin-B at 384 px."""
    settings = _cswin.BASE | {"img_size": 384, "drop_path_rate": 0.7}
    return _create(AgentCSWin, "agent_cswin_base_384", pretrained, kwargs, **settings)


@register_model
def test_agent_deit(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Small enough to test everything in seconds."""
    settings = {"dims": 32, "depth": 1, "num_heads": 2, "img_size": 96, "linear_depths": (1, 1, 1, 0)}
    return _create(AgentDeiT, "test_agent_deit", pretrained, kwargs, **settings)


@register_model
def test_agent_pvt(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Small enough to test everything in seconds."""
    return _create(AgentPVT, "test_agent_pvt", pretrained, kwargs, **TINIEST, img_size=96)


@register_model
def test_agent_swin(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Small enough to test everything in seconds."""
    return _create(AgentSwin, "test_agent_swin", pretrained, kwargs, **TINIEST, img_size=96, linear_depths=(1, 2, 0, 0))


@register_model
def test_agent_cswin(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Small enough to test everything in seconds."""
    return _create(
        AgentCSWin, "test_agent_cswin", pretrained, kwargs, **TINIEST, img_size=96, linear_depths=(1, 1, 0, 0)
    )
