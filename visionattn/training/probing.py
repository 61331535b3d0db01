"""How good the features of a frozen backbone are: nearest neighbours, a linear and an attentive probe.

The backbone runs once over all pictures, under its evaluation transform; its features stay in memory, (N + 1) x C
floats a picture. Run by `tools/probe.py`.
"""

from dataclasses import dataclass

import torch
from timm.data import create_transform, resolve_input_data_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from visionattn.training.config import DataConfig
from visionattn.training.data import MODES, Pictures, open_source, val_loader

PROBES = ("knn", "linear", "attentive")


@dataclass(frozen=True)
class Features:
    """What a backbone makes of some pictures.

    Attributes:
        tokens: (pictures, N, C), the last map.
        pooled: (pictures, C'), what its classifier would get.
        labels: (pictures,).
    """

    tokens: Tensor
    pooled: Tensor
    labels: Tensor


@torch.no_grad()
def extract(model: nn.Module, pictures: Pictures, config: DataConfig) -> Features:
    """Features of all pictures in their order; the model is put into evaluation mode and not changed."""
    device = next(model.parameters()).device
    model.eval()
    tokens, pooled, labels = [], [], []
    for images, targets in val_loader(pictures, config):
        last = model.forward_features(images.to(device))
        tokens.append(_as_tokens(last, getattr(model, "output_fmt", "NCHW")).float().cpu())
        pooled.append(model.forward_head(last, pre_logits=True).float().cpu())
        labels.append(targets)
    return Features(torch.cat(tokens), torch.cat(pooled), torch.cat(labels))


def _as_tokens(last: Tensor, layout: str) -> Tensor:
    """(B, C, H, W), (B, H, W, C) or (B, N, C) as (B, N, C)."""
    if last.ndim == 3:
        return last
    return last.flatten(1, 2) if layout == "NHWC" else last.flatten(2).transpose(1, 2)


class MultiQueryProbe(nn.Module):
    """Efficient probing of "Attention, Please!" (arXiv:2506.10178): tokens (B, N, C) to logits (B, classes).

    Query m, a vector of C, attends to the tokens as they are, softmax(q_m x^T / sqrt(C)), and gathers the m-th of M
    equal parts of the values W x. The parts, joined, are normalised over the batch and classified.

    Args:
        dim: C, a multiple of `num_queries`.
        num_classes: outputs.
        num_queries: M.
    """

    def __init__(self, dim: int, num_classes: int, num_queries: int = 32) -> None:
        super().__init__()
        if dim % num_queries:
            raise ValueError(f"num_queries is {num_queries}, wanted a divisor of the {dim} channels")
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, dim))
        self.value = nn.Linear(dim, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.classifier = nn.Linear(dim, num_classes)

    def pool(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, C)."""
        weights = (tokens @ self.queries.T * tokens.shape[-1] ** -0.5).softmax(1)  # (B, N, M)
        values = self.value(tokens).unflatten(2, (len(self.queries), -1))  # (B, N, M, C / M)
        return torch.einsum("bnm,bnmc->bmc", weights, values).flatten(1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool, normalise, classify."""
        return self.classifier(self.norm(self.pool(tokens)))


def score_knn(train: Features, val: Features, neighbours: int = 20, temperature: float = 0.07) -> float:
    """Top-1 in percent of the vote of the nearest pooled features by cosine, weighted exp(cosine / temperature)."""
    bank = normalize(train.pooled, dim=1)
    votes = one_hot(train.labels).float()
    right = 0
    for queries, labels in zip(normalize(val.pooled, dim=1).split(256), val.labels.split(256), strict=True):
        near = (queries @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        weights = (near.values / temperature).exp()[..., None]
        right += ((weights * votes[near.indices]).sum(1).argmax(1) == labels).sum().item()
    return 100 * right / len(val.labels)


def score_linear(train: Features, val: Features) -> float:
    """Top-1 in percent of a logistic regression on the standardised pooled features."""
    from sklearn.linear_model import LogisticRegression  # 1 s to import, and only this function needs it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    probe.fit(train.pooled.numpy(), train.labels.numpy())
    return 100 * float(probe.score(val.pooled.numpy(), val.labels.numpy()))


def score_attentive(
    train: Features, val: Features, num_queries: int = 32, epochs: int = 30, lr: float = 1e-3, seed: int = 0
) -> float:
    """Top-1 in percent of `MultiQueryProbe` after `epochs` of AdamW with a cosine, batches of 64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = MultiQueryProbe(train.tokens.shape[2], int(train.labels.max()) + 1, num_queries)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.01)
        batches = -(-len(train.labels) // 64)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
        for _ in range(epochs):
            # chunk makes batches of equal size, so that none is too small for its norm.
            for batch in torch.randperm(len(train.labels)).chunk(batches):
                loss = cross_entropy(probe(train.tokens[batch]), train.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    probe.eval()
    with torch.no_grad():
        logits = torch.cat([probe(tokens) for tokens in val.tokens.split(256)])
    return 100 * (logits.argmax(1) == val.labels).double().mean().item()


def probe_features(
    model: nn.Module, config: DataConfig, probes: tuple[str, ...] = PROBES, num_queries: int = 32, epochs: int = 30
) -> dict[str, float]:
    """Validation top-1 in percent of each probe on the data of `config`.

    Args:
        model: the backbone, with or without a classifier; it stays as it is.
        config: reader, root, parts, batch size and workers; its transforms are the model's own.
        probes: some of `PROBES`.
        num_queries: of the attentive probe.
        epochs: of the attentive probe.

    Raises:
        ValueError: data that cannot be read, an unknown probe, a number out of range, or queries that do not divide the
            channels.
    """
    if unknown := set(probes) - set(PROBES):
        raise ValueError(f"unknown probe {min(unknown)!r}, wanted some of {', '.join(PROBES)}")
    for key, value in (("queries", num_queries), ("epochs", epochs), ("batch_size", config.batch_size)):
        if value < 1:
            raise ValueError(f"{key} is {value}, wanted at least 1")
    source = open_source(config, seed=0)
    data_config = resolve_input_data_config(model, use_test_size=True)
    transform, mode = create_transform(**data_config), MODES[data_config["input_size"][0]]
    train, val = (
        extract(model, Pictures(reader, indices, mode, transform), config)
        for reader, indices in ((source.train, source.train_indices), (source.val, source.val_indices))
    )
    scores = {
        "knn": lambda: score_knn(train, val),
        "linear": lambda: score_linear(train, val),
        "attentive": lambda: score_attentive(train, val, num_queries, epochs),
    }
    return {name: scores[name]() for name in probes}
