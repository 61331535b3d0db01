"""Flow attention on the CPU: passes over the tokens, some thousand at a time.

Every pass takes the sigmoids anew, unless all tokens are computed at once. What a token takes in or gives out is one
number, which the backward keeps, and the gradients that run through these numbers are sums of a few vectors a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visionattn_kernels.cpu.tokens import grouped, image_groups, put, take, token_chunks
from visionattn_kernels.layout import empty_map

# Elements of queries of a group of images and thread, whose features all exist at once: half of what the tokens of one
# image may have.
GROUPED = 2**17


def forward(query, key, value, epsilon):
    """Sums of features, then of features over their flow, then of keys times values; at last the queries."""
    tokens, dim = query.shape[2:]
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = empty_map(value)
    moments, sums, partition = (
        query.new_zeros((*query.shape[:2], *shape), dtype=dtype) for shape in ((dim, value.shape[3]), (4, dim), ())
    )
    for images in image_groups(query, GROUPED):
        moment, total, part = grouped(images, moments, sums, partition)
        q, k, v = (x[images] for x in (query, key, value))
        of_q, of_k, of_taken, of_given = total.unbind(1)
        chunks, q, k, taken = token_chunks(q), _features(q, dtype), _features(k, dtype), []
        for some in chunks:
            of_q += q(some).sum(1)
            of_k += k(some).sum(1)
        for some in chunks:
            features = q(some)
            taken.append(_flow(features, of_k, epsilon))
            of_taken += _weighted_sum(features, 1 / taken[-1])
            features = k(some)
            of_given += _weighted_sum(features, 1 / _flow(features, of_q, epsilon))
        for some in chunks:
            features = k(some)
            odds = _flow(features, of_taken, epsilon).clamp_(-1, 1).exp_()
            part += odds.sum((1, 2))
            moment.baddbmm_((features * odds).transpose(1, 2), take(v, some, dtype))
        moment *= (tokens / part)[:, None, None]
        for some, flow in zip(chunks, taken, strict=True):
            features = q(some)
            gate = _flow(features, of_given, epsilon).sigmoid_() / flow
            put(out[images], some, (features @ moment).mul_(gate))
    return out, moments, sums, partition


def backward(grad, query, key, value, moments, sums, partition, epsilon):
    """Closed form: queries and keys take turns, because the flow of each depends on all of the others."""
    gradients = tuple(empty_map(x) for x in (query, key, value))
    for images in image_groups(query, GROUPED):
        tensors = (x[images] for x in (grad, query, key, value))
        of_heads = grouped(images, moments, sums, partition)
        _group_backward(*tensors, *of_heads, *(x[images] for x in gradients), epsilon)
    return gradients


def _group_backward(g, q, k, v, moments, sums, partition, grad_q, grad_k, grad_v, epsilon) -> None:
    """Write the gradients of some images into `grad_q`, `grad_k` and `grad_v`."""
    tokens, dtype, chunks = q.shape[2], moments.dtype, token_chunks(q)
    q, k = _features(q, dtype), _features(k, dtype)
    of_q, of_k, of_taken, of_given = sums.unbind(1)
    grad_moments = torch.zeros_like(moments)
    grad_of_q, grad_of_k, grad_of_taken, grad_of_given = (torch.zeros_like(x) for x in sums.unbind(1))
    sinks, sources = [], []
    for some in chunks:
        features, grads = q(some), take(g, some, dtype)
        taken, gate = _flow(features, of_k, epsilon), _flow(features, of_given, epsilon).sigmoid_()
        along = (grads * (features @ moments)).sum(-1, keepdim=True)
        by_sink = along * gate * (1 - gate) / taken
        grad_moments.baddbmm_(features.transpose(1, 2), grads * (gate / taken))
        grad_of_given += _weighted_sum(features, by_sink, epsilon)
        sinks.append((gate, taken, along, by_sink))
    mean = (grad_moments * moments).sum((1, 2))[:, None, None] / tokens
    for some in chunks:
        features, values = k(some), take(v, some, dtype)
        given, source = _flow(features, of_q, epsilon), _flow(features, of_taken, epsilon)
        weight = source.clamp(-1, 1).exp_() * (tokens / partition)[:, None, None]
        grads = features @ grad_moments
        by_source = weight * ((grads * values).sum(-1, keepdim=True) - mean) * (source.abs() <= 1)
        by_given = -(features @ grad_of_given.unsqueeze(-1)) / given**2
        put(grad_v, some, grads.mul_(weight))
        grad_of_taken += _weighted_sum(features, by_source, epsilon)
        grad_of_q += _weighted_sum(features, by_given, epsilon)
        sources.append((weight, given, by_source, by_given))
    for some, (gate, taken, along, by_sink) in zip(chunks, sinks, strict=True):
        features = q(some)
        by_taken = -(gate * along + features @ grad_of_taken.unsqueeze(-1)) / taken**2
        grad_of_k += _weighted_sum(features, by_taken, epsilon)
        product = (take(g, some, dtype) * (gate / taken)) @ moments.transpose(1, 2)
        numbers = by_sink, 1 / taken, by_taken, torch.ones_like(taken)
        vectors = of_given + epsilon, grad_of_taken, of_k + epsilon, grad_of_q
        put(grad_q, some, _join(features, product, numbers, vectors))
    for some, (weight, given, by_source, by_given) in zip(chunks, sources, strict=True):
        features = k(some)
        product = (take(v, some, dtype) * weight) @ grad_moments.transpose(1, 2)
        numbers = by_source, 1 / given, by_given, torch.ones_like(given)
        vectors = of_taken + epsilon, grad_of_given, of_q + epsilon, grad_of_k
        put(grad_k, some, _join(features, product, numbers, vectors))


def _features(x: Tensor, dtype: torch.dtype) -> Callable[[slice], Tensor]:
    """The sigmoids of some tokens of x (images, heads, N, D), taken once where they are computed all at a time."""
    if len(token_chunks(x)) == 1:
        features = take(x, slice(None), dtype).sigmoid()
        return lambda some: features
    x = x.flatten(0, 1)
    return lambda some: x[:, some].to(dtype).sigmoid()


def _flow(features: Tensor, total: Tensor, epsilon: float) -> Tensor:
    """(features + e) . (total + e) + e, (heads, n, 1)."""
    total = total + epsilon
    return features @ total.unsqueeze(-1) + epsilon * (1 + total.sum(-1))[:, None, None]


def _weighted_sum(features: Tensor, weights: Tensor, epsilon: float = 0.0) -> Tensor:
    """The sum over tokens of weights times (features + e), (heads, D)."""
    return (weights.transpose(1, 2) @ features).squeeze(1) + epsilon * weights.sum(1)


def _join(features: Tensor, product: Tensor, numbers: tuple[Tensor, ...], vectors: tuple[Tensor, ...]) -> Tensor:
    """The gradient of the tokens: `product` and the vectors, each times its number a token, through the sigmoid."""
    gradient = product.baddbmm_(torch.cat(numbers, -1), torch.stack(vectors, 1))
    return gradient.mul_(features).mul_(1 - features)
