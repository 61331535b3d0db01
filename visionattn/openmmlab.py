"""The backbones in mmdetection and mmsegmentation: `dict(type="VisionAttn", model="nat_mini")`.

Importing this module, for which mmengine's configs have `custom_imports`, is all that a config needs. It registers one
backbone in mmengine's root registry, which serves mmdet and mmseg alike, provides mmcv's compiled operators where they
are missing (`visionattn.mmcv_ext`), and reads checkpoints without running code that they carry.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import timm
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn

import visionattn  # noqa: F401  (registers the models)

try:
    import mmcv
    import mmengine  # noqa: F401
except ImportError as error:
    raise ImportError("visionattn.openmmlab needs mmcv and mmengine: pip install 'visionattn[mm]'") from error

from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.utils import digit_version

from visionattn import mmcv_ext
from visionattn.checkpoint import unwrap
from visionattn.mm_checkpoint import read_checkpoint
from visionattn.mm_run import PlaceSeeds, fit_to_machine, make_resumable

__all__ = ["PlaceSeeds", "VisionAttn", "VisionAttnOptimizer", "fit_to_machine", "make_resumable", "read_checkpoint"]

# OpenMMLab's maintained fork has a loader of its own and versions of its own that fit together.
_FORK = hasattr(mmengine_checkpoint, "_safe_torch_load")
_OLDEST, _TOO_NEW = "2.0.0rc4", "2.2.0"

if not _FORK and not digit_version(_OLDEST) <= digit_version(mmcv.__version__) < digit_version(_TOO_NEW):
    raise ImportError(
        f"mmdet 3.3 and mmseg 1.2 take mmcv from {_OLDEST} to below {_TOO_NEW}, found {mmcv.__version__}: "
        "pip install mmcv-lite==2.1.0"
    )
mmcv_ext.install()


if not _FORK:
    mmengine_checkpoint.CheckpointLoader.register_scheme("", read_checkpoint, force=True)


@MODELS.register_module()
class VisionAttn(BaseModule):
    """A model of timm, ours or its own, as a backbone: image (B, 3, H, W) to a tuple of contiguous maps (B, C, H', W').

    Args:
        model: Name of the model in timm.
        out_indices: Stages to return, from 0.
        pretrained: False for none, True for the published weights, or a file of a classifier, detector or segmenter
            with the authors' names or ours. `init_cfg=dict(type="Pretrained", checkpoint=..., prefix=...)` does the
            same when mmengine initialises the model.
        out_norm: Epsilon of a LayerNorm over channels on every output, as the authors' dense backbones have them; None
            for none.
        frozen_stages: Stages that do not train, with all that comes before: -1 for none, 0 for the stem alone.
        norm_eval: Whether batch norms keep their statistics in training.
        with_cp: Whether to recompute blocks in the backward instead of keeping activations.
        init_cfg: mmengine's initialisation.
        **kwargs: For the model: `dilations`, `n_win`, `drop_path_rate` and whatever else it takes.

    Raises:
        ValueError: There is no such backbone, an index is out of range, or the checkpoint does not fit.
        TypeError: The model takes no such argument.
    """

    def __init__(
        self,
        model: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: bool | str = False,
        out_norm: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | None = None,
        **kwargs: Any,
    ):
        super().__init__(init_cfg=init_cfg)
        self._create = _creator(model, kwargs)
        body = self._create(pretrained=pretrained is True)
        info = [dict(stage) for stage in body.feature_info]
        self.out_indices = tuple(out_indices)
        if not self.out_indices or list(self.out_indices) != sorted({*self.out_indices} & {*range(len(info))}):
            raise ValueError(f"out_indices must rise within 0 to {len(info) - 1} for {model}, got {out_indices}")
        deepest = self.out_indices[-1] + 1
        if not -1 <= frozen_stages <= deepest:
            raise ValueError(f"frozen_stages must be from -1 to {deepest} for {model}, got {frozen_stages}")
        self.norm_eval = norm_eval
        self.out_channels = [info[i]["num_chs"] for i in self.out_indices]
        self.strides = [info[i]["reduction"] for i in self.out_indices]
        if with_cp:
            body.set_grad_checkpointing()
        body.prune_intermediate_layers(list(self.out_indices), prune_norm=True, prune_head=True)
        self.body = body
        norms = zip(self.out_indices, self.out_channels, strict=True) if out_norm is not None else ()
        self.out_norms = nn.ModuleDict({str(i): LayerNorm2d(channels, eps=out_norm) for i, channels in norms})
        self._frozen = _first_modules(body, info, frozen_stages)
        self.register_load_state_dict_pre_hook(_translate)
        if isinstance(pretrained, str):
            self._load(pretrained)
        self.train()

    def init_weights(self) -> None:
        """Load the checkpoint of a `Pretrained` init_cfg; timm has drawn or loaded all other weights already."""
        if self.init_cfg and self.init_cfg["type"] == "Pretrained":
            self._load(self.init_cfg["checkpoint"], self.init_cfg.get("prefix"))
        elif self.init_cfg:
            super().init_weights()

    def _load(self, file: str, prefix: str | None = None) -> None:
        """Load a checkpoint into body and norms, all names or none."""
        tensors = _named_tensors(mmengine_checkpoint.CheckpointLoader.load_checkpoint(file, "cpu"))
        if prefix is None and any(name.startswith("backbone.") for name in tensors):
            prefix = "backbone"
        if prefix:
            start = prefix.rstrip(".") + "."
            tensors = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
        if not tensors:
            raise ValueError(f"{file}: no name begins with {prefix!r}")
        try:
            missing = self.load_state_dict(tensors, strict=False).missing_keys
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{file}: {error}") from error
        if any(name.startswith("body.") and not name.endswith("num_batches_tracked") for name in missing):
            raise ValueError(f"{file}: {len(missing)} names are missing, first {missing[0]!r}")

    def train(self, mode: bool = True) -> VisionAttn:
        """Train or not, except for what is frozen."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = False
        if self.norm_eval:
            for module in self.body.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, 3, H, W) to the stages' outputs, (B, C, H', W') each."""
        maps = self.body.forward_intermediates(
            x, indices=list(self.out_indices), stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        if self.out_norms:
            maps = [self.out_norms[str(i)](x) for i, x in zip(self.out_indices, maps, strict=True)]
        # Compiled mmcv operators read channels_last maps as if they were contiguous, without a word.
        return tuple(x.contiguous() for x in maps)


def _creator(name: str, kwargs: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """A function that makes the model without its classifier.

    Raises:
        ValueError: It is no model of timm, or gives no features.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise ValueError(f"model must be a backbone that timm knows, got {name!r}; nearest are {near}")

    def create(**further: Any) -> nn.Module:
        model = timm.create_model(name, num_classes=0, **kwargs, **further)
        if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
            raise ValueError(f"model must be a backbone with features of its stages, which {name!r} has not")
        return model

    return create


def _first_modules(body: nn.Module, info: Sequence[Mapping], frozen_stages: int) -> list[nn.Module]:
    """The modules of the stem and the first stages, which these models register in the order of execution."""
    if frozen_stages < 0:
        return []
    names = [name for name, _ in body.named_modules() if name]
    if frozen_stages:
        last = info[frozen_stages - 1]["module"]
        end = 1 + max(i for i, name in enumerate(names) if name == last or name.startswith(last + "."))
    else:
        end = names.index(info[0]["module"])
    return [body.get_submodule(name) for name in names[:end]]


def _named_tensors(checkpoint: Mapping) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, in or out of a training script's wrapper."""
    return unwrap(checkpoint)


def _translate(backbone: VisionAttn, state_dict: dict, prefix: str, *_: Any) -> None:
    """Before loading: give names of the authors' detectors, segmenters and classifiers our names, in place."""
    names = [name for name in state_dict if name.startswith(prefix)]
    if not names or any(name.startswith(prefix + "body.") for name in names):
        return
    weights = {name.removeprefix(prefix): state_dict.pop(name) for name in names}
    if backbone.out_norms:
        for i in range(len(backbone.body.feature_info)):
            for kind in ("weight", "bias"):
                for authors in (f"norm{i}", f"extra_norms.{i}", f"extra_norms.{i}.norm", f"extra_norm.{i}"):
                    tensor = weights.pop(f"{authors}.{kind}", None)
                    if tensor is not None and str(i) in backbone.out_norms:
                        state_dict[f"{prefix}out_norms.{i}.{kind}"] = tensor
    # Under this prefix the filters know that the classifier and its norm may be missing.
    weights = {f"backbone.{name}": x for name, x in weights.items()}
    whole = backbone._create(pretrained=True, pretrained_cfg_overlay={"state_dict": weights}).state_dict()
    kept = backbone.body.state_dict()
    state_dict.update({f"{prefix}body.{name}": x for name, x in whole.items() if name in kept})


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VisionAttnOptimizer(DefaultOptimWrapperConstructor):
    """mmengine's optimiser, with layer decay in the backbone and the authors' exclusions from weight decay.

    Of the backbone, norms, biases and what the model names in `no_weight_decay` have none. `paramwise_cfg` takes
    `layer_decay`, the factor of the learning rate from each layer of the backbone to the one below it (1 for none), and
    `norm_decay_mult`, which gives norms outside the backbone less or none. Everything else there is mmengine's.
    """

    def __call__(self, model: nn.Module):
        """The wrapped optimiser of a detector or segmenter."""
        options = dict(self.paramwise_cfg)
        decay = options.pop("layer_decay", 1.0)
        model = getattr(model, "module", model)
        backbones = {name: module for name, module in model.named_modules() if isinstance(module, VisionAttn)}
        if len(backbones) != 1:
            raise ValueError(f"model must have one backbone of type VisionAttn, got {len(backbones)}")
        (prefix, backbone), *_ = backbones.items()
        rules = _backbone_rules(backbone, decay, f"{prefix}." if prefix else "")
        options["custom_keys"] = {**options.get("custom_keys", {}), **rules}
        config = {"type": "OptimWrapper", **self.optim_wrapper_cfg, "optimizer": dict(self.optimizer_cfg)}
        return DefaultOptimWrapperConstructor(config, options)(model)


def _backbone_rules(backbone: VisionAttn, decay: float, prefix: str) -> dict[str, dict[str, float]]:
    """Factors of the learning rate and the weight decay of every parameter of the backbone, by its whole name."""
    body = backbone.body
    layers = group_parameters(body, body.group_matcher(), reverse=True)
    excluded = getattr(body, "no_weight_decay", set)()
    rules = {}
    for name, parameter in backbone.named_parameters():
        inner = name.removeprefix("body.")
        layer = layers.get(inner, max(layers.values()) + 1)
        plain = parameter.ndim > 1 and not any(fnmatch(inner, pattern) for pattern in excluded)
        rules[prefix + name] = {
            "lr_mult": decay ** (max(layers.values()) + 1 - layer),
            "decay_mult": float(plain),
        }
    return rules
