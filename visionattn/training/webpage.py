"""report.html of a run: one file without references to others, readable without a network.

Curves, the confusion matrix, the validation pictures of which the model was most sure and wrong, speed, configuration.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from visionattn.training.config import Config, DataConfig, to_yaml
from visionattn.training.data import Pictures, val_loader

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
img.curves { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e4e7eb; }
table.confusion td { min-width: 2rem; } table.confusion th { font-weight: 500; }
figure { display: inline-block; margin: 0 1rem 1rem 0; width: 9rem; vertical-align: top; font-size: 13px; }
figure img { width: 9rem; height: 9rem; object-fit: contain; background: #f1f4f7; image-rendering: pixelated; }
pre { background: #f1f4f7; padding: 1rem; overflow-x: auto; }
"""
_MOST_CLASSES = 40
_SIDE = 224


@dataclass(frozen=True)
class Verdicts:
    """What a model said of each validation picture.

    Attributes:
        labels: (pictures,), the right class.
        predicted: (pictures,), the most probable one.
        losses: (pictures,), cross entropy.
        probabilities: (pictures,), of the predicted class.
    """

    labels: np.ndarray
    predicted: np.ndarray
    losses: np.ndarray
    probabilities: np.ndarray

    def confusion(self, num_classes: int) -> np.ndarray:
        """(classes, classes): pictures of each right class (row) and predicted class (column)."""
        cells = np.bincount(self.labels * num_classes + self.predicted, minlength=num_classes**2)
        return cells.reshape(num_classes, num_classes)

    def worst(self, count: int) -> list[int]:
        """Positions of the wrongly classified pictures, largest loss first."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        return wrong[np.argsort(-self.losses[wrong], kind="stable")][:count].tolist()


@torch.inference_mode()
def judge(model: nn.Module, pictures: Pictures, config: DataConfig) -> Verdicts:
    """Verdicts of `model`, on its device and in evaluation mode from here on, over all pictures in their order."""
    device = next(model.parameters()).device
    model.eval()
    columns = []
    for images, labels in val_loader(pictures, config):
        logits = model(images.to(device)).float().cpu()
        best = logits.softmax(1).max(1)
        losses = cross_entropy(logits, labels, reduction="none")
        columns.append((labels.numpy(), best.indices.numpy(), losses.numpy(), best.values.numpy()))
    return Verdicts(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def webpage(
    config: Config,
    history: Sequence[dict[str, float]],
    curves_png: bytes,
    pictures: Pictures,
    class_names: Sequence[str],
    verdicts: Verdicts,
    speed: Sequence[str] = (),
    worst: int = 24,
) -> str:
    """The page as HTML.

    Args:
        config: of the run.
        history: a row an epoch, as in summary.csv.
        curves_png: the drawing of the curves.
        pictures: the validation pictures, in the order of `verdicts`.
        class_names: name of each class.
        verdicts: from `judge`.
        speed: lines on what the loop and the loader cost, if they were timed.
        worst: pictures to show of those classified wrongly.
    """
    right = 100 * float((verdicts.labels == verdicts.predicted).mean())
    rate = float(np.median([row["images_per_second"] for row in history]))
    title = escape(f"{config.model.name} on {config.data.root or config.data.reader}")
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{right:.2f} % of {len(verdicts.labels)} validation pictures right after {len(history)} epochs, "
        f"{rate:.1f} images/s in training (median of the epochs), "
        f"{sum(row['seconds'] for row in history):.0f} s in all.</p>",
        f'<h2>Curves</h2><img class="curves" alt="loss and accuracy" src="{_data_uri(curves_png)}">',
        "<h2>Confusion</h2>" + _confusion(verdicts.confusion(len(class_names)), class_names),
        "<h2>Most wrong</h2>" + _worst(pictures, class_names, verdicts, worst),
        "<h2>Epochs</h2>" + _epochs(history),
        *(["<h2>Loop and loader</h2><p>" + "<br>".join(map(escape, speed)) + "</p>"] if speed else []),
        f"<h2>Configuration</h2><pre>{escape(to_yaml(config))}</pre>",
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _confusion(cells: np.ndarray, names: Sequence[str]) -> str:
    """The matrix as a table; with many classes the most frequent confusions as a list."""
    if len(names) > _MOST_CLASSES:
        errors = cells * (1 - np.eye(len(names), dtype=cells.dtype))
        order = [int(i) for i in np.argsort(-errors, axis=None, kind="stable")[:_MOST_CLASSES] if errors.flat[i]]
        pairs = [(names[i // len(names)], names[i % len(names)], errors.flat[i]) for i in order]
        rows = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td><td>{n}</td></tr>" for a, b, n in pairs)
        return f'<table class="confusion"><tr><th>is</th><th>taken for</th><th>pictures</th></tr>{rows}</table>'
    header = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for name, row in zip(names, cells, strict=True):
        shares = row / max(row.sum(), 1)
        tint = (f"background: rgb(37 99 235 / {share:.2f})" for share in shares)
        data = "".join(f'<td style="{style}">{count}</td>' for style, count in zip(tint, row, strict=True))
        rows.append(f"<tr><th>{escape(name)}</th>{data}</tr>")
    caption = "<caption>rows: right class, columns: predicted class</caption>"
    return f'<table class="confusion">{caption}<tr><th></th>{header}</tr>{"".join(rows)}</table>'


def _worst(pictures: Pictures, names: Sequence[str], verdicts: Verdicts, count: int) -> str:
    """The pictures with what they are and what they were taken for."""
    figures = []
    for position in verdicts.worst(count):
        picture, label = pictures.picture(position)
        picture.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        picture.save(file, format="png")
        said = f"{escape(names[verdicts.predicted[position]])} {verdicts.probabilities[position]:.0%}"
        text = f"{escape(names[label])}, taken for {said}"
        figures.append(f'<figure><img alt="{text}" src="{_data_uri(file.getvalue())}"><br>{text}</figure>')
    return "".join(figures) or "<p>Every picture was classified rightly.</p>"


def _epochs(history: Sequence[dict[str, float]]) -> str:
    """The rows of summary.csv as a table."""
    header = "".join(f"<th>{escape(key)}</th>" for key in history[0])
    rows = ("".join(f"<td>{value:.4g}</td>" for value in row.values()) for row in history)
    return f"<table><tr>{header}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _data_uri(png: bytes) -> str:
    """The picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
