"""Classes of pictures, from a model that the training saved or that timm knows. Run by `tools/predict.py`."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import create_transform, resolve_input_data_config
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from visionattn.training.data import MODES, read_picture
from visionattn.training.drawing import draw_sheet
from visionattn.training.folder import check_ending, replacing
from visionattn.training.model import class_names

TABLES = (".csv", ".json", ".parquet")
SHEETS = (".png",)


@dataclass(frozen=True)
class Prediction:
    """One picture and its most probable classes.

    Attributes:
        path: the file.
        classes: (name, probability), most probable first.
    """

    path: Path
    classes: list[tuple[str, float]]


def find_pictures(paths: Sequence[str | Path]) -> list[Path]:
    """The files among `paths` as they are, and for each folder the pictures below it, in the order of their names.

    Raises:
        ValueError: a folder without pictures.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not os.path.isdir(path):  # without an error for a name that is too long
            found.append(path)
            continue
        inside = [x for x in sorted(path.rglob("*")) if x.suffix.lower() in IMG_EXTENSIONS and x.is_file()]
        if not inside:
            raise ValueError(f"the folder {path} holds no pictures")
        found += inside
    return found


@torch.inference_mode()
def classify(model: nn.Module, paths: Sequence[str | Path], topk: int = 5, batch_size: int = 32) -> list[Prediction]:
    """Predicts each picture with the preprocessing that was saved with the model, on the model's device.

    Args:
        model: from `visionattn.training.model`; it is put into evaluation mode.
        paths: files of pictures, of any size.
        topk: classes to return for each, at most as many as there are.
        batch_size: pictures that go through the model together.

    Raises:
        ValueError: no pictures, `topk` or `batch_size` below 1, or a picture that cannot be read.
    """
    if not paths:
        raise ValueError("no pictures to classify, wanted at least one")
    for name, value in (("topk", topk), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}, wanted at least 1")
    data_config = resolve_input_data_config(model, use_test_size=True)
    transform, mode = create_transform(**data_config), MODES[data_config["input_size"][0]]
    names = class_names(model)
    device = next(model.parameters()).device
    model.eval()
    predictions = []
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        images = torch.stack([transform(read_picture(path, mode)) for path in batch]).to(device)
        best = model(images).float().softmax(1).topk(min(topk, len(names)))
        for path, values, indices in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
            classes = [(names[index], value) for index, value in zip(indices, values, strict=True)]
            predictions.append(Prediction(Path(path), classes))
    return predictions


def write_table(predictions: Sequence[Prediction], path: str | Path) -> None:
    """Writes a row a picture: path, class_1, probability_1, class_2, ...; as CSV, JSON or Parquet by the name's ending.

    Raises:
        ValueError: another ending, or Parquet without pyarrow.
    """
    import pandas  # 0.5 s to import, and only this function needs it

    path = Path(path)
    check_ending(path, *TABLES)
    rows = []
    for prediction in predictions:
        row: dict[str, str | float] = {"path": str(prediction.path)}
        for place, (name, probability) in enumerate(prediction.classes, 1):
            row |= {f"class_{place}": name, f"probability_{place}": probability}
        rows.append(row)
    with replacing(path) as temporary:
        if path.suffix == ".json":
            temporary.write_text(json.dumps(rows, indent=1) + "\n")
        elif path.suffix == ".csv":
            pandas.DataFrame(rows).to_csv(temporary, index=False)
        else:
            try:
                temporary.write_bytes(pandas.DataFrame(rows).to_parquet(index=False))
            except ImportError as error:
                raise ValueError(f"{path} needs pyarrow: pip install pyarrow") from error


def write_sheet(predictions: Sequence[Prediction], path: str | Path) -> None:
    """Draws the pictures with their classes on one PNG, of `visionattn.training.drawing.sheet_size`.

    Raises:
        ValueError: another ending, or a picture that cannot be read.
    """
    check_ending(path, *SHEETS)
    cells = [(x.path.name, read_picture(x.path, "RGB"), x.classes) for x in predictions]
    with replacing(Path(path)) as temporary:
        draw_sheet(cells, temporary)
