"""Linear attention on the CPU: two passes over the tokens, some thousand at a time.

One pass reduces keys and values to their means, the other applies these to the queries; backward is one pass over the
queries and one over keys and values. Features and rotations exist for the tokens at hand alone, in at least float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visionattn_kernels.cpu.tokens import grouped, image_groups, put, take, token_chunks
from visionattn_kernels.layout import empty_map

# Elements of queries of a group of images and thread. Grouping copies, but a call of torch costs as much as a small
# map's product.
GROUPED = 2**18


class Rule(NamedTuple):
    """How a query's product with the moments is normalised; `floor` is epsilon over the number of tokens."""

    normalization: str
    scale: Tensor
    epsilon: float
    floor: float


def forward(query, key, value, scale, rotary, normalization, feature_map, epsilon):
    """Means of keys and values, then the queries."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, _, dim = query.shape
    out, turns = empty_map(value), _turns(rotary, dtype)
    shapes = (dim, value.shape[3]), (dim,), value.shape[3:]
    all_means = [query.new_zeros((batch, heads, *shape), dtype=dtype) for shape in shapes]
    for images in image_groups(query, GROUPED):
        means, q = grouped(images, *all_means), query[images]
        _add_means(means, key[images], value[images], turns, feature_map, with_values=normalization != "division")
        rule = _rule(normalization, scale, epsilon, q, dtype)
        covariance = _covariance(means, rule) if normalization == "subtraction" else None
        unturned = covariance is None and turns is None
        joint = torch.cat([means[0], means[1].unsqueeze(-1)], -1) if unturned else None
        for some in token_chunks(q):
            features = _features(q, some, feature_map, dtype)
            put(out[images], some, _apply(features, _turn(features, turns, some), means, joint, covariance, rule))
    return out, *all_means


def _add_means(
    means: list[Tensor], key: Tensor, value: Tensor, turns: Tensor | None, feature_map: str, with_values: bool
) -> None:
    """Add up the means over the tokens: of turned key features times values, of key features and maybe of values."""
    moments, key_mean, value_mean = means
    share = 1 / key.shape[2]
    for some in token_chunks(key):
        features, values = _features(key, some, feature_map, moments.dtype), take(value, some, moments.dtype)
        moments.baddbmm_(_turn(features, turns, some).transpose(1, 2), values, alpha=share)
        key_mean.add_(features.sum(1), alpha=share)
        if with_values:
            value_mean.add_(values.sum(1), alpha=share)


def backward(
    grad, query, key, value, scale, rotary, moments, key_mean, value_mean, normalization, feature_map, epsilon
):
    """Closed form: the gradients of the means come out of the queries' pass and go into the keys' pass."""
    dtype, turns = moments.dtype, _turns(rotary, moments.dtype)
    gradients, grad_scales = tuple(empty_map(x) for x in (query, key, value)), []
    for images in image_groups(query, GROUPED):
        g, q, k, v = (x[images] for x in (grad, query, key, value))
        means = grouped(images, moments, key_mean, value_mean)
        grad_q, grad_k, grad_v = (x[images] for x in gradients)
        rule = _rule(normalization, scale, epsilon, q, dtype)
        covariance = _covariance(means, rule) if normalization == "subtraction" else None
        sums: list[Tensor] = []
        for some in token_chunks(q):
            features, some_grad = _features(q, some, feature_map, dtype), take(g, some, dtype)
            if covariance is None:
                turned = _turn(features, turns, some)
                grad_features, *parts = _apply_backward(some_grad, features, turned, means, rule, turns, some)
                _add(sums, *parts)
            else:
                grad_features = some_grad @ covariance.transpose(1, 2)
                _add(sums, features.transpose(1, 2) @ some_grad, some_grad.sum(1))
            put(grad_q, some, _times_slope(grad_features, features, feature_map))
        by_scale, *grad_means = sums if covariance is None else _covariance_backward(sums, means, rule)
        grad_scales.append(by_scale.view(-1, len(scale)).sum(0))
        by_moments, by_key, by_value = (x.div_(q.shape[2]) for x in grad_means)
        for some in token_chunks(q):
            features, values = _features(k, some, feature_map, dtype), take(v, some, dtype)
            if turns is None:
                grad_features = torch.baddbmm(by_key.unsqueeze(1), values, by_moments.transpose(1, 2))
            else:
                grad_features = _turn(values @ by_moments.transpose(1, 2), turns, some, back=True)
                grad_features += by_key.unsqueeze(1)
            put(grad_k, some, _times_slope(grad_features, features, feature_map))
            turned = _turn(features, turns, some)
            put(grad_v, some, torch.baddbmm(by_value.unsqueeze(1), turned, by_moments))
    return *gradients, sum(grad_scales).to(scale.dtype)


def _add(sums: list[Tensor], *parts: Tensor) -> None:
    """Add each part to its sum; the first parts become the sums."""
    if sums:
        for total, part in zip(sums, parts, strict=True):
            total += part
    else:
        sums.extend(parts)


def _rule(normalization: str, scale: Tensor, epsilon: float, query: Tensor, dtype: torch.dtype) -> Rule:
    """The rule for all heads of some images, whose queries are (images, heads, N, D)."""
    images, heads, tokens = query.shape[:3]
    of_heads = scale.to(dtype).expand(images * heads // len(scale), -1).reshape(-1, 1, 1)
    return Rule(normalization, of_heads, epsilon, epsilon / tokens)


def _covariance(means: list[Tensor], rule: Rule) -> Tensor:
    """Of key features and values, (heads, D, E), times the scale."""
    moments, key_mean, value_mean = means
    return torch.baddbmm(moments, key_mean.unsqueeze(-1), value_mean.unsqueeze(1), alpha=-1).mul_(rule.scale)


def _covariance_backward(sums: list[Tensor], means: list[Tensor], rule: Rule) -> tuple[Tensor, ...]:
    """Gradients of scale and means from the products of query features and gradient, and from the gradient's sum."""
    (products, grad_sum), (moments, key_mean, value_mean) = sums, means
    by_scale = torch.baddbmm(moments, key_mean.unsqueeze(-1), value_mean.unsqueeze(1), alpha=-1).mul_(products)
    products = products * rule.scale
    by_key = (products @ value_mean.unsqueeze(-1)).squeeze(-1).neg_()
    return by_scale.sum((1, 2)), products, by_key, grad_sum - (key_mean.unsqueeze(1) @ products).squeeze(1)


def _apply(
    features: Tensor,
    turned: Tensor,
    means: list[Tensor],
    joint: Tensor | None,
    covariance: Tensor | None,
    rule: Rule,
) -> Tensor:
    """The result of some queries, (heads, n, E).

    Features that are not turned meet the moments and the mean of the keys in one product, with both joined.
    """
    if covariance is not None:
        return torch.baddbmm(means[2].unsqueeze(1), features, covariance)
    if joint is None:
        y, z = turned @ means[0], _along(features, means[1])
    else:
        y, z = (features @ joint).split([means[0].shape[2], 1], -1)
    if rule.normalization == "division":
        return y.mul_(rule.scale / z.clamp(min=rule.floor))
    z = z * rule.scale
    y.mul_(rule.scale * (1 + 1 / (z + rule.epsilon)))
    return y.addcmul_(z, means[2].unsqueeze(1), value=-1)


def _apply_backward(
    grad: Tensor, features: Tensor, turned: Tensor, means: list[Tensor], rule: Rule, turns: Tensor | None, some: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of some queries' features, and what the queries add to those of scale and the three means."""
    moments, key_mean, value_mean = means
    z, grad_turned = _along(features, key_mean), grad @ moments.transpose(1, 2)
    along_y = (turned * grad_turned).sum(-1, keepdim=True)
    if rule.normalization == "division":
        divisor = z.clamp(min=rule.floor)
        gain, by_scale = rule.scale / divisor, along_y.div_(divisor)
        by_z = (gain * by_scale).mul_(z >= rule.floor).neg_()
        by_value = torch.zeros_like(value_mean)
    else:
        inverse = (rule.scale * z + rule.epsilon).reciprocal_()
        by_scaled_z = -rule.scale * inverse**2 * along_y - _along(grad, value_mean)
        gain, by_scale = rule.scale * (1 + inverse), (1 + inverse) * along_y + z * by_scaled_z
        by_z = rule.scale * by_scaled_z
        by_value = (grad * (-rule.scale * z)).sum(1)
    by_key = (by_z.transpose(1, 2) @ features).squeeze(1)
    by_moments = (turned * gain).transpose(1, 2) @ grad
    grad_features = _turn(grad_turned.mul_(gain), turns, some, back=True)
    return grad_features.addcmul_(by_z, key_mean.unsqueeze(1)), by_scale.sum((1, 2)), by_moments, by_key, by_value


def _along(x: Tensor, direction: Tensor) -> Tensor:
    """Inner products (heads, n, 1) of (heads, n, D) with (heads, D)."""
    return x @ direction.unsqueeze(-1)


def _features(x: Tensor, some: slice, feature_map: str, dtype: torch.dtype) -> Tensor:
    """The feature map of some tokens of (images, heads, N, D), (heads of all images, n, D); it may be x itself."""
    if feature_map == "relu":
        # In contiguous memory, which joins images and heads without another copy.
        x = x[:, :, some].to(dtype)
        return torch.clamp(x, min=0, out=torch.empty(x.shape, dtype=dtype)).flatten(0, 1)
    x = take(x, some, dtype)
    # Four passes in the cache, and five times as fast as `elu`, whose expm1 is not vectorised.
    return x.clamp(max=0).exp_().add_(x.relu()) if feature_map == "elu_plus_one" else x


def _times_slope(grad: Tensor, features: Tensor, feature_map: str) -> Tensor:
    """`grad`, which may be changed, times the derivative of the feature map, told from its result."""
    if feature_map == "relu":
        return torch.ops.aten.threshold_backward(grad, features, 0)
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
