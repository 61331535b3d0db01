"""The backbones in mmdetection and mmsegmentation: `dict(type="VisionAttn", model="nat_mini")`.

Importing this module, for which mmengine's configs have `custom_imports`, is all that a config needs. It registers one
backbone in mmengine's root registry, which serves mmdet and mmseg alike, provides mmcv's compiled operators where they
are missing (`visionattn.mmcv_ext`), and reads checkpoints without running code that they carry.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
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

from mmengine.model import BaseModule, PretrainedInit, initialize
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.utils import digit_version

from visionattn import mmcv_ext
from visionattn.checkpoint import fit, unwrap
from visionattn.mm_checkpoint import check_fit, read_checkpoint, read_trained
from visionattn.mm_run import PlaceSeeds, fit_to_machine, make_resumable

__all__ = [
    "PlaceSeeds",
    "VisionAttn",
    "VisionAttnOptimizer",
    "check_fit",
    "fit_to_machine",
    "make_resumable",
    "read_checkpoint",
    "read_trained",
]

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
        init_cfg: mmengine's initialisation, which changes the layers that it names alone.
        **kwargs: For the model: `dilations`, `n_win`, `drop_path_rate` and whatever else it takes.

    Raises:
        ValueError: There is no such backbone, an index is out of range, or the checkpoint does not fit.
        TypeError: The model takes no such argument, or `pretrained` is neither a bool nor a file.
    """

    def __init__(
        self,
        model: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: bool | str | os.PathLike | None = False,
        out_norm: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **kwargs: Any,
    ):
        super().__init__(init_cfg=init_cfg)
        if not isinstance(pretrained, bool | str | os.PathLike | None):
            raise TypeError(f"pretrained must be True, False or a file, got {pretrained!r}")
        # No closure, which could not be pickled with the model.
        self._create = partial(_create, model, kwargs)
        body = self._create(pretrained=pretrained is True)
        info = [dict(stage) for stage in body.feature_info]
        self.out_indices = tuple(out_indices) if isinstance(out_indices, Sequence) else ()
        stages = sorted({i for i in self.out_indices if isinstance(i, int)} & {*range(len(info))})
        if not self.out_indices or list(self.out_indices) != stages:
            raise ValueError(f"out_indices must rise within 0 to {len(info) - 1} for {model}, got {out_indices}")
        deepest = self.out_indices[-1] + 1
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= deepest:
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
        # Names, since conversions to and from synchronised batch norms put new modules in their places.
        self._frozen = _first_modules(body, info, frozen_stages)
        self.register_load_state_dict_pre_hook(_translate)
        if isinstance(pretrained, str | os.PathLike):
            self._load(pretrained)
        self.train()

    def init_weights(self) -> None:
        """Do what init_cfg says and no more, since timm has drawn or loaded all weights already.

        Raises:
            ValueError: It says nothing that could be done, or its checkpoint does not fit.
        """
        steps = self.init_cfg or []
        steps = [steps] if isinstance(steps, dict) else steps
        if not isinstance(steps, list | tuple) or not all(isinstance(step, dict) and "type" in step for step in steps):
            raise ValueError(f"init_cfg must be a dict with a type, or a list of them, got {self.init_cfg!r}")
        files = [step for step in steps if step["type"] in ("Pretrained", PretrainedInit)]
        initialize(self, [step for step in steps if step not in files])
        for step in files:  # last, as in mmengine, so that they count
            if not isinstance(step.get("checkpoint"), str | os.PathLike):
                raise ValueError(f"init_cfg of type Pretrained must have a file as its checkpoint, got {step}")
            self._load(step["checkpoint"], step.get("prefix"))

    def _load(self, file: str | os.PathLike, prefix: str | None = None) -> None:
        """Load a checkpoint into body and norms, all names or none."""
        checkpoint = mmengine_checkpoint.CheckpointLoader.load_checkpoint(os.fspath(file), "cpu")
        tensors = unwrap(checkpoint) if isinstance(checkpoint, Mapping) else {}
        if not tensors:
            raise ValueError(f"{file}: must hold named tensors, found none in its {type(checkpoint).__name__}")
        if prefix is None and any(name.startswith("backbone.") for name in tensors):
            prefix = "backbone"
        if prefix:
            start = prefix.rstrip(".") + "."
            tensors = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
        if not tensors:
            raise ValueError(f"{file}: no name begins with {prefix!r}")
        try:
            if any(name.startswith("body.") for name in tensors):
                _check_own(self, tensors)
            missing = self.load_state_dict(tensors, strict=False).missing_keys
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{file}: {error}") from error
        if any(name.startswith("body.") and not name.endswith("num_batches_tracked") for name in missing):
            raise ValueError(f"{file}: {len(missing)} names are missing, first {missing[0]!r}")

    def train(self, mode: bool = True) -> VisionAttn:
        """Train or not, except for what is frozen."""
        super().train(mode)
        for module in map(self.body.get_submodule, self._frozen):
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


def _create(name: str, arguments: Mapping[str, Any], **further: Any) -> nn.Module:
    """The model without its classifier.

    Raises:
        ValueError: It is no model of timm, or gives no features.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise ValueError(f"model must be a backbone that timm knows, got {name!r}; nearest are {near}")
    model = timm.create_model(name, num_classes=0, **arguments, **further)
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
        raise ValueError(f"model must be a backbone with features of its stages, which {name!r} has not")
    return model


def _first_modules(body: nn.Module, info: Sequence[Mapping], frozen_stages: int) -> list[str]:
    """Names of the modules of the stem and the first stages, which these models register in the order of execution."""
    if frozen_stages < 0:
        return []
    names = [name for name, _ in body.named_modules() if name]
    if frozen_stages:
        last = info[frozen_stages - 1]["module"]
        end = 1 + max(i for i, name in enumerate(names) if name == last or name.startswith(last + "."))
    else:
        end = names.index(info[0]["module"])
    return names[:end]


def _check_own(backbone: VisionAttn, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless tensors in our own names fit; norms, and stages that only one side keeps, are free."""
    whole, kept = backbone._create(), backbone.body.state_dict()
    norms = [f"out_norms.{i}.{kind}" for i in range(len(whole.feature_info)) for kind in ("weight", "bias")]
    free = [*norms, *(name for name in whole.state_dict() if name not in kept)]
    fit({name.removeprefix("body."): x for name, x in tensors.items()}, whole, free)


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
    `norm_decay_mult`, which gives norms outside the backbone less or none. Everything else there is mmengine's: in the
    backbone the longest fitting one of `custom_keys` multiplies the learning rate by its `lr_mult`, on top of
    `layer_decay`, and its `decay_mult`, if it has one, takes the place of the authors' exclusion.
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
        keys = options.get("custom_keys", {})
        # mmengine's order; a rule of ours is a whole name, which it would take for the longest key.
        order = sorted(sorted(keys), key=len, reverse=True)
        for name, rule in rules.items():
            chosen = next((keys[key] for key in order if key in name), {})
            if self.base_wd is None:  # the optimiser has no weight decay to multiply
                del rule["decay_mult"]
            rule.update(chosen, lr_mult=rule["lr_mult"] * chosen.get("lr_mult", 1.0))
        options["custom_keys"] = {**keys, **rules}
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
