"""Classes of pictures, from a model that the training saved or that timm knows. Run by `tools/predict.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import nn

from visionattn.training.data import MODES, read_picture
from visionattn.training.drawing import draw_sheet
from visionattn.training.folder import replacing
from visionattn.training.model import class_names


@dataclass(frozen=True)
class Prediction:
    """One picture and its most probable classes.

    Attributes:
        path: the file.
        picture: what the model saw, before resizing.
        classes: (name, probability), most probable first.
    """

    path: Path
    picture: Image.Image
    classes: list[tuple[str, float]]


@torch.inference_mode()
def classify(model: nn.Module, paths: Sequence[str | Path], topk: int = 5) -> list[Prediction]:
    """Predicts each picture with the preprocessing that was saved with the model, on the model's device.

    Args:
        model: from `visionattn.training.model`; it is put into evaluation mode.
        paths: files of pictures, of any size.
        topk: classes to return for each, at most as many as there are.

    Raises:
        ValueError: no pictures, `topk` below 1, or a picture that cannot be read; all are read before any is predicted.
    """
    if not paths:
        raise ValueError("no pictures to classify, wanted at least one")
    if topk < 1:
        raise ValueError(f"topk is {topk}, wanted at least 1")
    data_config = resolve_input_data_config(model, use_test_size=True)
    transform = create_transform(**data_config)
    pictures = [read_picture(path, MODES[data_config["input_size"][0]]) for path in paths]
    names = class_names(model)
    device = next(model.parameters()).device
    model.eval()
    predictions = []
    for path, picture in zip(paths, pictures, strict=True):
        logits = model(transform(picture)[None].to(device))[0].float()
        best = logits.softmax(0).topk(min(topk, len(names)))
        classes = [(names[index], value) for value, index in zip(*(x.tolist() for x in best), strict=True)]
        predictions.append(Prediction(Path(path), picture, classes))
    return predictions


def write_sheet(predictions: Sequence[Prediction], path: str | Path) -> None:
    """Draws the pictures with their classes on one PNG, of `visionattn.training.drawing.sheet_size`."""
    cells = [(prediction.path.name, prediction.picture, prediction.classes) for prediction in predictions]
    with replacing(Path(path)) as temporary:
        draw_sheet(cells, temporary)
