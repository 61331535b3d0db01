"""What a classifier without a network reaches on the same split, so that an accuracy can be judged."""

import numpy as np
from torch.nn.functional import adaptive_avg_pool2d

from visionattn.training.data import Pictures

_SIDE = 28


def score_baselines(train: Pictures, val: Pictures) -> dict[str, float]:
    """Validation accuracy in percent of 1-nearest-neighbour and of logistic regression on the pixels.

    Pictures are averaged down to 28x28 at most. Both methods hold all of them in memory: for small sets only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    models = {
        "1-nearest-neighbour": KNeighborsClassifier(1),
        # Strong regularisation: the pixels outnumber what a few thousand pictures determine.
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)),
    }
    pixels, labels = _as_table(train)
    val_pixels, val_labels = _as_table(val)
    return {
        name: 100 * float(model.fit(pixels, labels).score(val_pixels, val_labels)) for name, model in models.items()
    }


def _as_table(pictures: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """(pictures, pixels) and (pictures,)."""
    rows, labels = [], []
    for position in range(len(pictures)):
        tensor, label = pictures[position]
        size = [min(side, _SIDE) for side in tensor.shape[1:]]
        rows.append(adaptive_avg_pool2d(tensor, size).flatten().numpy())
        labels.append(label)
    return np.stack(rows), np.array(labels)
