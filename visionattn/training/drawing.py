"""Pictures for people: the curves of a run, and predictions on a contact sheet."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

_INK, _SOFT, _ACCENT, _SECOND = "#1f2933", "#9aa5b1", "#2563eb", "#d97706"
_BAR, _SOFT_BAR = "#8fb4fa", "#d9e5fd"
_DPI = 100
CELL_INCHES = (2.4, 3.2)


def draw_curves(history: Sequence[Mapping[str, float]], baselines: Mapping[str, float], path: Path) -> None:
    """Loss and accuracy over the epochs, baselines as lines, as PNG (1100x450)."""
    figure = Figure(figsize=(11, 4.5), dpi=_DPI, layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    curves = (
        (losses, "train_loss", "training", _SOFT),
        (losses, "val_loss", "validation", _ACCENT),
        (accuracies, "train_top1", "training", _SOFT),
        (accuracies, "val_top1", "validation", _ACCENT),
        (accuracies, "ema_top1", "validation, averaged weights", _SECOND),
    )
    for axes, key, label, color in curves:
        if key in history[0]:
            axes.plot(epochs, [row[key] for row in history], label=label, color=color, marker=".", linewidth=1.8)
    for style, (name, value) in zip(("--", ":", "-."), baselines.items(), strict=False):
        accuracies.axhline(value, color=_INK, linestyle=style, linewidth=1, label=f"{name} {value:.1f} %")
    for axes, title in ((losses, "Loss"), (accuracies, "Top-1 accuracy (%)")):
        axes.set_title(title, loc="left", color=_INK)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def sheet_size(count: int, columns: int = 5) -> tuple[int, int]:
    """(width, height) in pixels of the contact sheet of `count` pictures."""
    width, height = CELL_INCHES
    columns = min(columns, count)
    return round(columns * width * _DPI), round(math.ceil(count / columns) * height * _DPI)


def draw_sheet(
    pictures: Sequence[tuple[str, Image.Image, Sequence[tuple[str, float]]]], path: Path, columns: int = 5
) -> None:
    """Pictures with their best classes as bars below them, as PNG of `sheet_size`.

    Args:
        pictures: (caption, picture, [(class, probability), ...] best first) of each.
        path: where to write.
        columns: pictures in a row.
    """
    width, height = sheet_size(len(pictures), columns)
    columns = min(columns, len(pictures))
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained", facecolor="white")
    cells = figure.subfigures(math.ceil(len(pictures) / columns), columns, squeeze=False).flatten()
    for cell, (caption, picture, classes) in zip(cells, pictures, strict=False):
        top, bottom = cell.subplots(2, 1, height_ratios=(3, 0.35 * len(classes) + 0.2))
        top.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        top.set_title(_shorten(caption, 30), fontsize=8, color=_INK, parse_math=False)
        top.axis("off")
        _draw_bars(bottom, classes)
    figure.savefig(path, format="png")


def _draw_bars(axes, classes: Sequence[tuple[str, float]]) -> None:
    """A horizontal bar for each class on its track, the name on its left and the probability on its right."""
    for row, (name, probability) in enumerate(classes):
        axes.barh(row, 1, color="#f1f4f7", height=0.8)
        axes.barh(row, probability, color=_BAR if row == 0 else _SOFT_BAR, height=0.8)
        weight = "bold" if row == 0 else "normal"
        style = {"fontsize": 8, "va": "center", "color": _INK, "weight": weight, "parse_math": False}
        axes.text(0.03, row, _shorten(name, 24), **style)
        axes.text(0.97, row, f"{probability:.1%}", ha="right", **style)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.axis("off")


def _shorten(text: str, length: int) -> str:
    """The text, its middle left out where it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length - length // 2) :]}"
