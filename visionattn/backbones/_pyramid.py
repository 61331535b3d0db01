"""Stem, stages, norm, head: all that timm asks of a backbone, written once.

A family builds its stem and its stages and hands them to `Pyramid`. A map is (B, C, H, W) between stages and
(B, H, W, C) in blocks: the same memory, since what leaves a block is channels_last.
"""

# No `from __future__ import annotations` in modules that fx traces: fx copies the annotations of `forward` into the
# source of the traced module, where TorchScript does not know a string.
from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class Stage(nn.Module):
    """Blocks at one resolution, after an optional downsample. (B, C, H, W) to (B, dim, H', W').

    Args:
        dim: Channels of the blocks.
        downsample: Module to this stage's resolution and width, (B, C, H, W) to (B, dim, H', W'); Identity for none.
        blocks: Modules on (B, H, W, dim), or on (B, dim, H, W) where `channels_first`.
        channels_first: Layout of the blocks.
        norm: Norm of the blocks' result, which the next stage sees too; on (B, dim, H', W'), None for none.
    """

    def __init__(
        self,
        dim: int,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        channels_first: bool = False,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        self.dim = dim
        self.grad_checkpointing = False
        self.channels_first = channels_first
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        """Downsample, then run the blocks."""
        x = self.downsample(x)
        if not self.channels_first:
            x = x.permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        if not self.channels_first:
            x = x.permute(0, 3, 1, 2)
        return self.norm(x)


class Pyramid(nn.Module):
    """A backbone as timm knows it: features, intermediates, pruning, a resettable head, layer decay, checkpointing.

    Args:
        stem: Image (B, in_chans, H, W) to the first stage's input.
        stages: The stages; stage i gives feature i.
        norm: Norm of the last stage's output, (B, C, H, W) to the same shape.
        reductions: Pixels of the image per position of each stage's output, along a side.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling before the classifier, by timm's names; "" for none.
        drop_rate: Dropout before the classifier.
        head: A head that does more than pool and classify, made with the four arguments before; None for timm's.
        device: Where the head's parameters live.
        dtype: Type of the head's parameters.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        norm: nn.Module,
        reductions: Sequence[int],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        head: ClassifierHead | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = stages[-1].dim
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": stage.dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (stage, reduction) in enumerate(zip(stages, reductions, strict=True))
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        if head is None:
            head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, device=device, dtype=dtype)
        self.head = head
        self.head_hidden_size = head.num_features
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights anew: linear layers from a truncated normal of deviation 0.02, others by their own rule."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that order the parameters by depth, for layer decay."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99998,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an Identity without classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of `num_classes`, and the pooling unless `global_pool` is None."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to the last stage's normed output (B, C, H', W')."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify (B, C, H', W'); with `pre_logits` only pool."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Run the stages and keep their outputs.

        Args:
            x: (B, in_chans, H, W)
            indices: Which stages to keep: the last n for an int, all for None.
            norm: Whether the last stage's kept output is normed; the others have no norm.
            stop_early: Whether to stop after the last stage kept.
            output_fmt: Layout of what is kept, "NCHW".
            intermediates_only: Whether to return only what is kept.

        Returns:
            What is kept, behind the output of `forward_features` unless `intermediates_only`.

        Raises:
            ValueError: `output_fmt` is another one.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        kept, last = [], len(self.stages) - 1
        take, deepest = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        for index, stage in enumerate(self.stages[: deepest + 1] if stop_early else self.stages):
            x = stage(x)
            if index in take:
                kept.append(self.norm(x) if norm and index == last else x)
        if intermediates_only:
            return kept
        return (self.norm(x) if not stop_early or deepest == last else x), kept

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages in `indices` do not need.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Whether the final norm goes too; it goes in any case with the last stage.
            prune_head: Whether the head goes too; likewise.

        Returns:
            The indices of the stages kept.
        """
        take, deepest = feature_take_indices(len(self.stages), indices)
        shortened = deepest < len(self.stages) - 1
        self.stages = self.stages[: deepest + 1]
        if shortened:
            self.num_features = self.feature_info[deepest]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            plain = ClassifierHead(self.num_features, 0, "", self.head.drop.p, **get_device_dtype(self))
            self.head = plain.train(self.training)
            self.reset_classifier(0, "")
        return take
