"""Linear attention on the CPU: two passes over the tokens, some thousand at a time.

One pass reduces keys and values to their means, the other applies these to the queries; backward is one pass over the
queries and one over keys and values. Features and rotations exist for the tokens at hand alone, in at least float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visionattn_kernels.cpu.tokens import grouped, image_groups, put, token_chunks
from visionattn_kernels.layout import empty_map

# Elements of queries of a group of images. Grouping copies, which pays only for maps of about 7x7.
GROUPED = 2**17


class Rule(NamedTuple):
    """How a query's product with the moments is normalised; `floor` is epsilon over the number of tokens."""

    normalization: str
    scale: Tensor
    epsilon: float
    floor: float


def forward(query, key, value, scale, rotary, normalization, feature_map, epsilon):
    """Means of keys and values, then the queries."""
    batch, heads, tokens, dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = empty_map(value)
    moments = query.new_zeros((batch, heads, dim, value.shape[-1]), dtype=dtype)
    key_mean, value_mean = (x.new_zeros((batch, heads, x.shape[-1]), dtype=dtype) for x in (key, value))
    turns = _turns(rotary, dtype)
    for images in image_groups(query, GROUPED):
        q, k, v, *means = grouped(images, query, key, value, moments, key_mean, value_mean)
        rule = _rule(normalization, scale, epsilon, q, dtype)
        for some in token_chunks(q):
            features, values = _features(k[:, some], feature_map, dtype), v[:, some].to(dtype)
            means[0].baddbmm_(_turn(features, turns, some).transpose(1, 2), values)
            means[1].add_(features.sum(1))
            means[2].add_(values.sum(1))
        for mean in means:
            mean /= tokens
        for some in token_chunks(q):
            features = _features(q[:, some], feature_map, dtype)
            put(out[images], some, _apply(features, _turn(features, turns, some), means, rule))
    return out, moments, key_mean, value_mean


def backward(
    grad, query, key, value, scale, rotary, moments, key_mean, value_mean, normalization, feature_map, epsilon
):
    """Closed form: the gradients of the means come out of the queries' pass and go into the keys' pass."""
    tokens, dtype = query.shape[2], moments.dtype
    gradients = tuple(empty_map(x) for x in (query, key, value))
    grad_scale, turns = moments.new_zeros(moments.shape[:2]), _turns(rotary, dtype)
    for images in image_groups(query, GROUPED):
        g, q, k, v, by_scale, *means = grouped(
            images, grad, query, key, value, grad_scale, moments, key_mean, value_mean
        )
        grad_q, grad_k, grad_v = (x[images] for x in gradients)
        grad_means = [torch.zeros_like(mean) for mean in means]
        rule = _rule(normalization, scale, epsilon, q, dtype)
        for some in token_chunks(q):
            features = _features(q[:, some], feature_map, dtype)
            grad_turned, grad_features = _apply_backward(
                g[:, some].to(dtype), features, _turn(features, turns, some), means, grad_means, by_scale, rule
            )
            grad_features = _turn(grad_turned, turns, some, back=True) + grad_features
            put(grad_q, some, _times_slope(grad_features, features, feature_map))
        for mean in grad_means:
            mean /= tokens
        for some in token_chunks(q):
            features, values = _features(k[:, some], feature_map, dtype), v[:, some].to(dtype)
            grad_features = _turn(values @ grad_means[0].transpose(1, 2), turns, some, back=True)
            grad_features += grad_means[1].unsqueeze(1)
            put(grad_k, some, _times_slope(grad_features, features, feature_map))
            turned = _turn(features, turns, some)
            put(grad_v, some, torch.baddbmm(grad_means[2].unsqueeze(1), turned, grad_means[0]))
    return *gradients, grad_scale.sum(0).to(scale.dtype)


def _rule(normalization: str, scale: Tensor, epsilon: float, query: Tensor, dtype: torch.dtype) -> Rule:
    """The rule for all heads of some images, whose queries are (heads of all images, N, D)."""
    heads, tokens = query.shape[:2]
    return Rule(normalization, scale.to(dtype).repeat(heads // len(scale))[:, None, None], epsilon, epsilon / tokens)


def _apply(features: Tensor, turned: Tensor, means: list[Tensor], rule: Rule) -> Tensor:
    """The result of some queries, (heads, n, E)."""
    if rule.normalization == "subtraction":
        return torch.baddbmm(means[2].unsqueeze(1), features, rule.scale * _covariance(means))
    y, z = _products(features, turned, means)
    if rule.normalization == "division":
        return y.mul_(rule.scale / z.clamp(min=rule.floor))
    y.mul_(rule.scale * (1 + 1 / (rule.scale * z + rule.epsilon)))
    return y.addcmul_(rule.scale * z, means[2].unsqueeze(1), value=-1)


def _apply_backward(
    grad: Tensor,
    features: Tensor,
    turned: Tensor,
    means: list[Tensor],
    grad_means: list[Tensor],
    grad_scale: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor | float]:
    """Gradients of some queries' features, turned and not; those of means and scale are added to what is there."""
    _, key_mean, value_mean = means
    if rule.normalization == "subtraction":
        covariance = _covariance(means)
        products = features.transpose(1, 2) @ grad
        scaled = rule.scale * products
        grad_means[0] += scaled
        grad_means[1] -= (scaled @ value_mean.unsqueeze(-1)).squeeze(-1)
        grad_means[2] += grad.sum(1) - (key_mean.unsqueeze(1) @ scaled).squeeze(1)
        grad_scale += (products * covariance).sum((1, 2))
        return grad @ (rule.scale * covariance).transpose(1, 2), 0.0
    y, z = _products(features, turned, means)
    along_y = (grad * y).sum(-1, keepdim=True)
    if rule.normalization == "division":
        divisor = z.clamp(min=rule.floor)
        gain, by_scale = rule.scale / divisor, along_y / divisor
        by_z = -gain * by_scale * (z >= rule.floor)
    else:
        inverse = 1 / (rule.scale * z + rule.epsilon)
        by_scaled_z = -rule.scale * inverse**2 * along_y - grad @ value_mean.unsqueeze(-1)
        gain, by_scale = rule.scale * (1 + inverse), (1 + inverse) * along_y + z * by_scaled_z
        by_z = rule.scale * by_scaled_z
        grad_means[2] -= (grad * (rule.scale * z)).sum(1)
    grad_y = grad * gain
    grad_means[0].baddbmm_(turned.transpose(1, 2), grad_y)
    grad_means[1] += (features * by_z).sum(1)
    grad_scale += by_scale.sum((1, 2))
    return grad_y @ means[0].transpose(1, 2), by_z * key_mean.unsqueeze(1)


def _covariance(means: list[Tensor]) -> Tensor:
    """Of key features and values, (heads, D, E)."""
    moments, key_mean, value_mean = means
    return moments - key_mean.unsqueeze(-1) * value_mean.unsqueeze(1)


def _products(features: Tensor, turned: Tensor, means: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The y (heads, n, E) and z (heads, n, 1), in one matrix product unless a rotation tells their queries apart."""
    moments, key_mean = means[0], means[1].unsqueeze(-1)
    if turned is not features:
        return turned @ moments, features @ key_mean
    y, z = (features @ torch.cat([moments, key_mean], -1)).split([moments.shape[-1], 1], -1)
    return y, z


def _features(x: Tensor, feature_map: str, dtype: torch.dtype) -> Tensor:
    """The feature map of x, which may be x itself."""
    x = x.to(dtype)
    if feature_map == "relu":
        return x.relu()
    # Four passes in the cache, and five times as fast as `elu`, whose expm1 is not vectorised.
    return x.clamp(max=0).exp_().add_(x.relu()) if feature_map == "elu_plus_one" else x


def _times_slope(grad: Tensor, features: Tensor, feature_map: str) -> Tensor:
    """`grad`, which is changed, times the derivative of the feature map, told from its result."""
    if feature_map == "relu":
        return grad.mul_(features > 0)
    return grad.mul_(features.clamp(max=1)) if feature_map == "elu_plus_one" else grad


def _turns(rotary: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Rotations as complex numbers, (N, D / 2)."""
    return None if rotary is None else torch.complex(*rotary.to(dtype).unbind(0))


def _turn(x: Tensor, turns: Tensor | None, some: slice, back: bool = False) -> Tensor:
    """Rotate the pairs of channels of (heads, n, D) by the angles of the tokens `some`; x itself without `turns`."""
    if turns is None:
        return x
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    # A lazy conj() is lost where a compiled program calls the op.
    return torch.view_as_real(pairs * (turns[some].conj_physical() if back else turns[some])).flatten(-2)
