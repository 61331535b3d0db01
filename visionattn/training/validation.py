"""The accuracy of finished models on a folder of pictures. Run by `tools/validate.py`.

The folder holds one folder for each class. Which output of the model a class folder means is decided by its name: a
name that was saved with the model, a WordNet id of ImageNet (`n01440764`), or the number of the class, as ImageNet-V2
has it. Where a folder has fewer classes than the model, as ImageNet-A and ImageNet-R do, only those compete, as their
authors do.
"""

import csv
import io
import json
import pkgutil
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_input_data_config
from timm.models import get_pretrained_cfg
from torch import nn
from torch.nn.functional import cross_entropy

from visionattn.registry import published
from visionattn.training.config import DataConfig
from visionattn.training.data import MODES, Pictures, val_loader
from visionattn.training.folder import check_ending, replacing
from visionattn.training.readers import read_folder

TOLERANCE = 0.1
RESULTS = (".csv", ".json")
_REAL_LABELS = "_info/imagenet_real_labels.json"


@dataclass(frozen=True)
class Accuracy:
    """What a model reached.

    Attributes:
        model: its name or folder.
        count: pictures that were counted.
        top1: share of them in percent whose most probable class was right.
        top5: likewise among the five most probable, or all where there are fewer.
        loss: mean cross entropy; none with several right classes a picture.
        input_size: (C, H, W) of the test.
        crop_pct: share of the resized picture that was seen.
        images_per_second: loading included.
        published_top1: what the authors published for the model, where known.
    """

    model: str
    count: int
    top1: float
    top5: float
    loss: float | None
    input_size: tuple[int, int, int]
    crop_pct: float
    images_per_second: float
    published_top1: float | None = None

    @property
    def reproduced(self) -> bool:
        """Whether top-1 is at most 0.1 off the published value."""
        return self.published_top1 is not None and abs(self.top1 - self.published_top1) <= TOLERANCE + 1e-9


def class_outputs(model: nn.Module, folders: Sequence[str]) -> list[int]:
    """For each class folder the output of `model` that it means.

    Raises:
        ValueError: a name that means no output of the model.
    """
    known = {str(name): index for index, name in enumerate(model.pretrained_cfg.get("label_names") or ())}
    if not known and (subset := infer_imagenet_subset(model)):
        known = {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())}
    numbers = {str(index): index for index in range(model.num_classes)}
    names = known if set(folders) & known.keys() else numbers
    if unknown := [name for name in folders if name not in names]:
        raise ValueError(f"the class folder {unknown[0]!r} is none of the model's {len(names)} classes")
    return [names[name] for name in folders]


def real_labels() -> dict[str, list[int]]:
    """The right classes of each picture of ImageNet's validation set by its file name (arXiv:2006.07159)."""
    labels = json.loads(pkgutil.get_data("timm.data", _REAL_LABELS))
    return {f"ILSVRC2012_val_{number:08d}": right for number, right in enumerate(labels, 1)}


@torch.inference_mode()
def validate(
    name: str,
    model: nn.Module,
    root: str | Path,
    *,
    size: int | None = None,
    crop_pct: float | None = None,
    batch_size: int = 64,
    workers: int = 2,
    real: bool = False,
) -> Accuracy:
    """Counts every picture below `root` once.

    Args:
        name: how the result names the model; where timm's registry knows it, its published accuracy joins the result.
        model: from `visionattn.training.model`, on its device; it is put into evaluation mode.
        root: folder of class folders.
        size: side of the test pictures, by default the model's own test size.
        crop_pct: share of the resized picture that is seen, by default the model's own.
        batch_size: pictures that go through the model together.
        workers: processes that load pictures.
        real: count against the several right classes of ImageNet-ReaL and leave out the pictures that have none.

    Raises:
        ValueError: no such folder, a class folder that means no class of the model or occurs twice, a picture that
            cannot be read, a number out of range.
    """
    for key, value in (("size", size), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{key} is {value}, wanted at least 1")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct}, wanted above 0, at most 1")
    reader = read_folder(root)
    folders = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    outputs = torch.tensor(class_outputs(model, folders))
    asked: dict[str, Any] = {"crop_pct": crop_pct}
    if size is not None:
        asked["input_size"] = (model.in_chans, size, size)
    config = resolve_input_data_config(model, asked, use_test_size=size is None)
    pictures = Pictures(reader, np.arange(len(reader)), MODES[config["input_size"][0]], create_transform(**config))
    right_classes = _right_classes(pictures) if real else None

    device = next(model.parameters()).device
    model.eval()
    hits, losses, seen, start = [], [], 0, time.perf_counter()
    for images, labels in val_loader(pictures, DataConfig(batch_size=batch_size, workers=workers)):
        logits = model(images.to(device)).float().cpu()
        if right_classes is None:
            logits = logits[:, outputs]  # the columns are the folders now, and so are the labels
            losses.append(cross_entropy(logits, labels, reduction="none"))
            right = [[label] for label in labels.tolist()]
        else:
            right = right_classes[seen : seen + len(labels)]
        best = logits.topk(min(5, logits.shape[1])).indices.tolist()
        hits += [
            [top[0] in wanted, not set(top).isdisjoint(wanted)]
            for top, wanted in zip(best, right, strict=True)
            if wanted
        ]
        seen += len(labels)
    if not hits:
        raise ValueError(f"{root}: none of the {seen} pictures has a label to count")
    top1, top5 = (100 * np.mean(hits, axis=0)).tolist()
    return Accuracy(
        model=name,
        count=len(hits),
        top1=top1,
        top5=top5,
        loss=torch.cat(losses).double().mean().item() if losses else None,
        input_size=tuple(config["input_size"]),
        crop_pct=config["crop_pct"],
        images_per_second=seen / (time.perf_counter() - start),
        published_top1=published_top1(name),
    )


def _right_classes(pictures: Pictures) -> list[list[int]]:
    """The right classes of each picture after ImageNet-ReaL, by the number in its file name."""
    labels = real_labels()
    found = []
    for position in range(len(pictures)):
        file = pictures.name(position)
        number = re.search(r"ILSVRC2012_val_\d{8}", Path(file).name)
        if number is None:
            raise ValueError(f"{file} is no picture of ImageNet's validation set, wanted ILSVRC2012_val_NNNNNNNN")
        found.append(labels.get(number.group(), []))
    return found


def published_top1(name: str) -> float | None:
    """Top-1 in percent that the authors published for the model `name`, or None."""
    entry = get_pretrained_cfg(name, allow_unregistered=True) if ":" not in name else None
    notes = [note for note in (entry and entry.notes) or () if note.startswith("top1: ")]
    return published(entry).get("top1") if notes else None


def write_results(results: Sequence[Accuracy], path: str | Path) -> None:
    """Writes a row a model, as CSV or JSON by the ending of `path`.

    Raises:
        ValueError: another ending.
    """
    check_ending(path, *RESULTS)
    path, rows = Path(path), [asdict(result) for result in results]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n" if path.suffix == ".json" else _as_csv(rows))


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows with a header; sizes as CxHxW."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(dict(row) | {"input_size": "x".join(map(str, row["input_size"]))} for row in rows)
    return table.getvalue()
