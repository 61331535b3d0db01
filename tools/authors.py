"""The authors' models as `authors_<name>` in timm, from checkouts of their repositories, to be timed beside ours.

A folder holds the checkouts under the names of their repositories, at the commits with which our models were compared:

    git clone https://github.com/rayleizhu/BiFormer authors/BiFormer
    git -C authors/BiFormer checkout 1697bbb
    python tools/benchmark.py model --authors authors authors_biformer_tiny biformer_tiny

The others stand below. Their code is imported as it is, with the settings of their trainings. What it wants of packages
that are gone, or that nothing else here needs, has a stand-in which does the same: timm's modules under their former
names, and the few functions that it calls of einops and yacs.
"""

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib import import_module
from math import prod
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import timm
import yaml
from torch import Tensor, nn

PREFIX = "authors_"


class Checkout(NamedTuple):
    """Where authors have their code.

    Attributes:
        repository: Owner and name on GitHub.
        commit: With which our models were compared.
        folder: Within the checkout, where the code is run.
    """

    repository: str
    commit: str
    folder: str = "."


VAN = Checkout("Visual-Attention-Network/VAN-Classification", "e19779b")
BIFORMER = Checkout("rayleizhu/BiFormer", "1697bbb")
DAVIT = Checkout("dingmyu/davit", "fc79470", "timm")
MALA = Checkout("qhfan/MALA", "7114e63", "classfication_release")  # spelt so
L2VIT = Checkout("ChuanyangZheng/L2ViT", "fad0341", "classification")
AGENT = Checkout("LeapLabTHU/Agent-Attention", "207ce3e", "agent_transformer")
INLINE = Checkout("LeapLabTHU/InLine", "e463a6f")

TRUNKS = (
    "deit_tiny deit_small deit_base pvt_tiny pvt_small pvt_medium pvt_large "
    "swin_tiny swin_small swin_base swin_base_384 cswin_tiny cswin_small cswin_base cswin_base_384"
)


def register(folder: Path, names: Sequence[str]) -> None:
    """Register those of `names` that begin with `authors_` in timm.

    Raises:
        ValueError: One of them is none of the authors' models, or its checkout is not in `folder`.
    """
    for name in names:
        if name.startswith(PREFIX):
            timm.models.register_model(_entrypoint(folder, name))


def _entrypoint(folder: Path, name: str) -> Callable[..., nn.Module]:
    """A function as timm registers it; the checkout is imported from when it is called."""
    models = _models()
    if name.removeprefix(PREFIX) not in models:
        raise ValueError(f"wanted one of {', '.join(PREFIX + known for known in models)}, got {name}")
    checkout, build = models[name.removeprefix(PREFIX)]
    code = folder.resolve() / checkout.repository.split("/")[1] / checkout.folder
    if not code.is_dir():
        raise ValueError(
            f"wanted a checkout of github.com/{checkout.repository} at {checkout.commit}, found no folder {code}"
        )

    def entrypoint(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None) -> nn.Module:
        with _importing_from(code), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those that torch gives for code of that age
            return build()

    entrypoint.__name__ = name
    return entrypoint


def _models() -> dict[str, tuple[Checkout, Callable[[], nn.Module]]]:
    """Our name of each model, its checkout, and what makes it while modules can be imported from there."""
    models = {"biformer_stl": (BIFORMER, partial(_call, "models.biformer_stl", "biformer_stl", drop_path_rate=0.1))}
    for size, rate in ("b0", 0.1), ("b1", 0.1), ("b2", 0.1), ("b3", 0.2), ("b4", 0.0), ("b5", 0.0), ("b6", 0.0):
        models[f"van_{size}"] = VAN, partial(_call, "models.van", f"van_{size}", drop_path_rate=rate)
    for name, rate in ("biformer_tiny", 0.0), ("biformer_small", 0.15), ("biformer_base", 0.0):
        models[name] = BIFORMER, partial(_call, "models.biformer", name, drop_path_rate=rate)
    for size in "tiny", "small", "base":
        models[f"davit_{size}"] = DAVIT, partial(_call, "models.davit", f"DaViT_{size}")
    for size in "tiny", "small", "base", "large":
        models[f"mala_{size}"] = MALA, partial(_call, "model", f"MALA_{size[0].upper()}")
    for size, rate in ("tiny", 0.0), ("small", 0.0), ("base", 0.3), ("base_384", 0.2):
        models[f"l2vit_{size}"] = L2VIT, partial(_call, "models.l2vit", f"L2ViT_{size.title()}", drop_path_rate=rate)
    for size in TRUNKS.split():
        models[f"inline_{size}"] = INLINE, partial(_configured, f"inline_{size}")
    for size in (*TRUNKS.split(), "deit_small_448", "pvt_medium_256", "swin_small_288"):
        models[f"agent_{size}"] = AGENT, partial(_configured, f"agent_{size}")
    return models


def _call(module: str, function: str, **settings: float) -> nn.Module:
    return getattr(import_module(module), function)(**settings)


def _configured(name: str) -> nn.Module:
    """By the authors' own builder, from their settings and the file that changes them."""
    config = import_module("config")
    letters = {"tiny": "t", "small": "s", "medium": "m", "large": "b", "base": "b"}
    file = "_".join(letters.get(word, word) for word in name.split("_"))
    config._C.merge(yaml.safe_load(Path(config.__file__).with_name("cfgs").joinpath(f"{file}.yaml").read_text()))
    return import_module("models.build").build_model(config._C)


@contextlib.contextmanager
def _importing_from(code: Path) -> Iterator[None]:
    """Import from a checkout for a while, without what its packages import besides; it leaves no module behind."""
    models = ModuleType("models")
    models.__path__ = [str(code / "models")]
    standing_in = _stand_ins() | {"models": models}
    before = {name: sys.modules[name] for name in standing_in if name in sys.modules}
    sys.modules |= standing_in
    sys.path.insert(0, str(code))
    try:
        with mock.patch("timm.models.register_model", _unregistered):
            yield
    finally:
        sys.path.remove(str(code))
        for name, module in list(sys.modules.items()):
            if name in standing_in or (getattr(module, "__file__", None) or "").startswith(f"{code}/"):
                del sys.modules[name]
        sys.modules |= before


def _stand_ins() -> dict[str, ModuleType]:
    """What the checkouts import and would not find, by name."""
    init = timm.models.vision_transformer.init_weights_vit_timm
    # What is None is imported, but not called where a model without weights is made.
    helpers = {"build_model_with_cfg": _from_class, "named_apply": timm.models.named_apply}
    helpers |= dict.fromkeys(["adapt_input_conv", "load_pretrained"]) | {"overlay_external_default_cfg": _nothing}
    former = {
        "layers": timm.layers,
        "helpers": _module(**helpers),
        "registry": _module(register_model=_unregistered),
        "vision_transformer": _module(checkpoint_filter_fn=None, _init_vit_weights=init, _cfg=dict),
    }
    return {
        **{f"timm.models.{name}": module for name, module in former.items()},
        **{f"models.{name}": module for name, module in former.items()},  # DaViT lives in a copy of timm
        "fairscale.nn.checkpoint": _module(checkpoint_wrapper=None),
        "fvcore.nn": _module(FlopCountAnalysis=None, flop_count_table=None),
        "einops": _module(rearrange=_rearrange),
        "einops.layers.torch": _module(Rearrange=_Rearrange),
        "yacs.config": _module(CfgNode=_Settings),
    }


def _module(**contents: object) -> ModuleType:
    module = ModuleType("stand_in")
    vars(module).update(contents)
    return module


def _nothing(*args: object) -> None:
    """In place of what concerns weights."""


def _unregistered(function: Callable) -> Callable:
    """In place of timm's decorator: the names are ours already."""
    return function


def _from_class(model: type[nn.Module], variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """In place of timm's builder of that time: the model without what concerns weights."""
    settings = {"default_cfg", "representation_size", "pretrained_filter_fn", "pretrained_custom_load"}
    return model(**{name: value for name, value in kwargs.items() if name not in settings})


@lru_cache
def _axes(pattern: str) -> list[list[list[str]]]:
    """For each side of a pattern of einops, the names in each of its axes."""
    return [[axis.strip("()").split() for axis in re.findall(r"\(.*?\)|\S+", side)] for side in pattern.split("->")]


def _rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """In place of einops' function, and like it reshapes, permutes, reshapes."""
    before, after = _axes(pattern)
    for size, names in zip(x.shape, before, strict=True):
        known = prod(sizes[name] for name in names if name in sizes)
        sizes |= {name: size // known for name in names if name not in sizes}
    order = [name for names in before for name in names]
    x = x.reshape([sizes[name] for name in order])
    x = x.permute([order.index(name) for names in after for name in names])
    return x.reshape([prod(sizes[name] for name in names) for names in after])


class _Rearrange(nn.Module):
    """In place of einops' module."""

    def __init__(self, pattern: str, **sizes: int):
        super().__init__()
        self.pattern, self.sizes = pattern, sizes

    def forward(self, x: Tensor) -> Tensor:
        return _rearrange(x, self.pattern, **self.sizes)


class _Settings(dict):
    """In place of yacs' tree of settings."""

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__

    def merge(self, values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                self[name].merge(value)
            else:
                self[name] = value
