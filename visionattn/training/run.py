"""What lives through a training: model, data, optimiser and history, set up from a configuration or a checkpoint."""

import copy
import math
import textwrap
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import create_transform, resolve_input_data_config
from torch import nn

from visionattn.training.augment import Augmentation, BatchAugment
from visionattn.training.batch_size import fit_batch_size
from visionattn.training.config import Config, ModelConfig
from visionattn.training.data import (
    MODES,
    AugmentedPictures,
    Draw,
    Pictures,
    Source,
    check_pictures,
    open_source,
    train_loader,
    val_loader,
)
from visionattn.training.distillation import build_distillation
from visionattn.training.folder import RunFolder
from visionattn.training.hub import check_hub
from visionattn.training.model import blocks, build_model
from visionattn.training.optimisation import build_ema, build_loss, build_optimizer, build_schedule
from visionattn.training.sharding import (
    check_launcher,
    load_whole_optimizer_state,
    load_whole_state,
    shard,
    whole_optimizer_state,
    whole_state,
)
from visionattn.training.stream import stream_loader
from visionattn.training.tracking import choose_trackers

_STATE_KINDS = {"model": dict, "optimizer": dict, "updates": int, "history": list, "baselines": dict, "data": dict}


class Run:
    """Everything of one training that lives from its first to its last epoch.

    Setting it up reads and checks but writes nothing.

    Raises:
        ValueError: a configuration, data set, checkpoint or output folder that cannot be used.
    """

    def __init__(self, config: Config) -> None:
        self.folder = RunFolder(config.output)
        self.config = config = self.folder.with_fitted_batch(config)
        self.resumes = self.folder.begin(config)
        check_launcher()
        if config.push_to_hub:
            check_hub(config.push_to_hub)
        self.accelerator = Accelerator(
            cpu=config.device == "cpu",
            mixed_precision=mixed_precision(config),
            gradient_accumulation_steps=config.optimizer.accumulate,
            log_with=choose_trackers(config.trackers) or None,
            project_dir=config.output,
        )
        if config.precision == "fp16" and self.accelerator.device.type == "cpu":
            # accelerate 1.15 would train in float32 and say nothing.
            raise ValueError("precision=fp16 wants an accelerator and there is only the CPU, wanted bf16 or fp32")
        if config.time_loop and (self.accelerator.num_processes > 1 or config.data.reader == "wds"):
            raise ValueError("time_loop wants one process, and data that is not read shard by shard")
        if config.threads:
            torch.set_num_threads(config.threads)
        set_seed(config.seed)
        source = open_source(config.data, config.seed)
        self.class_names = source.class_names
        model = build_model(config.model, len(self.class_names), config.data.input_size)
        self.data_config = resolve_input_data_config(model, vars(config.data))
        self.train, self.val = _make_pictures(source, config, self.data_config)
        if config.data.check_pictures:
            check_pictures(self.train)
            check_pictures(self.val)

        if config.model.grad_checkpointing:
            model.set_grad_checkpointing()
        self.memory_format = torch.channels_last if config.model.channels_last else torch.contiguous_format
        model.to(self.accelerator.device, memory_format=self.memory_format)
        self.ema = build_ema(model, config)
        self.augment = BatchAugment(config.augment, len(self.class_names), self.accelerator.device)
        self.loss = build_loss(config)
        self.distill = build_distillation(config.distill, self.class_names, self.data_config, self.accelerator.device)
        if config.data.find_batch_size and not self.resumes:
            self.config = config = fit_batch_size(self, model)
            self.accelerator.gradient_accumulation_steps = config.optimizer.accumulate
        self._whole = copy.deepcopy(model).cpu() if config.fsdp else None
        if config.fsdp:
            shard(model, self.accelerator.num_processes)
            if self.ema:
                shard(self.ema.module, self.accelerator.num_processes)
        # What is sharded already must not be wrapped for DDP.
        self.model = self.accelerator.prepare_model(model, evaluation_mode=config.fsdp)
        self.optimizer, self.val_loader = self.accelerator.prepare(
            build_optimizer(model, config.optimizer), val_loader(self.val, config.data)
        )
        if config.data.reader == "wds":
            self.train_loader = stream_loader(self.train, config.data, config.seed, self.accelerator)
        else:
            self.train_loader = self.accelerator.prepare(train_loader(self.train, config.data, config.seed))
        compile_model(self.bare_model, config.model)
        self.updates_per_epoch = math.ceil(len(self.train_loader) / config.optimizer.accumulate)
        self.schedule, self.epochs = build_schedule(self.optimizer, config.schedule, self.updates_per_epoch)
        self.updates = 0
        self.history: list[dict[str, float]] = []
        self.within: dict[str, Any] | None = None  # of an epoch that has begun: batches done, sums, seconds
        self.baselines: dict[str, float] = {}
        if self.resumes:
            self._restore(self.folder.load_last())

    @property
    def bare_model(self) -> nn.Module:
        """The model without what accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def whole(self, model: nn.Module) -> nn.Module:
        """`model`, or where its weights are shared the copy that holds them all; in the first process, wanting all."""
        if self._whole is None:
            return model
        if state := whole_state(model):
            self._whole.load_state_dict(state)
        return self._whole

    def state(self) -> dict[str, Any]:
        """What last.pt holds, complete in the first process and wanting them all; loads with `weights_only=True`."""
        scaler = self.accelerator.scaler
        return {
            "model": whole_state(self.bare_model),
            "ema": whole_state(self.ema.module) if self.ema else None,
            "optimizer": whole_optimizer_state(self.bare_model, self.optimizer.optimizer),
            "scaler": scaler.state_dict() if scaler else None,
            "updates": self.updates,
            "history": self.history,
            "within": self.within,
            "baselines": self.baselines,
            "data": self._data(),
        }

    def _data(self) -> dict[str, Any]:
        """What a continuation has to find in the data as it was, wherever that lies now."""
        return {
            "classes": self.class_names,
            "training pictures": len(self.train),
            "validation pictures": len(self.val),
        }

    def save(self) -> None:
        """Replaces last.pt with what the training is now."""
        state = self.state()
        if self.accelerator.is_main_process:
            self.folder.save_last(state)

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            for key, kind in _STATE_KINDS.items():
                if not isinstance(state[key], kind):
                    raise ValueError(f"its {key} is of type {type(state[key]).__name__}, wanted {kind.__name__}")
            for key, now in self._data().items():
                if state["data"][key] != now:
                    raise ValueError(f"its data had {key}: {state['data'][key]}, that of now has {now}")
            load_whole_state(self.bare_model, state["model"])
            if self.ema:
                load_whole_state(self.ema.module, state["ema"])
            load_whole_optimizer_state(self.bare_model, self.optimizer.optimizer, state["optimizer"])
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.updates, self.history, self.baselines = state["updates"], state["history"], state["baselines"]
            self.within = state["within"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else textwrap.shorten(str(error), 400)
            raise ValueError(f"{self.folder.last} is not a checkpoint of {self.config.model.name}: {reason}") from error
        self.schedule.step_update(self.updates)


def compile_model(model: nn.Module, config: ModelConfig) -> None:
    """Lets torch compile `model`, or its blocks, or nothing, in place: names and what accelerate wrapped stay.

    Raises:
        ValueError: the blocks of a model that has none.
    """
    if not config.compile:
        return
    parts = blocks(model) if config.compile == "blocks" else [model]
    if not parts:
        raise ValueError(f"model.compile=blocks, but {config.name} has no blocks, wanted true")
    for part in parts:
        part.compile()


def mixed_precision(config: Config) -> str:
    """What accelerate calls the precision that `config` asks for: `no`, `bf16` or `fp16`."""
    if config.precision != "auto":
        return "no" if config.precision == "fp32" else config.precision
    cuda = config.device == "auto" and torch.cuda.is_available()
    return "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def _make_pictures(source: Source, config: Config, data_config: dict[str, Any]) -> tuple[AugmentedPictures, Pictures]:
    """The training pictures, whose augmentation is tried on one of them, and the validation pictures."""
    channels = data_config["input_size"][0]
    if channels not in MODES:
        raise ValueError(f"data.input_size has {channels} channels, wanted one of {sorted(MODES)}")
    augmentation = Augmentation(config.augment.transforms, data_config)
    train = AugmentedPictures(source.train, source.train_indices, MODES[channels], augmentation)
    train[Draw(0, 0)]
    return train, Pictures(source.val, source.val_indices, MODES[channels], create_transform(**data_config))
