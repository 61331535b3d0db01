"""Linear attention: every token attends to all tokens at a cost that is linear in their number.

    out[i] = gain(z[i]) y[i] + shift(z[i]) mean_j v[j]
    y[i] = R_i f(q[i]) . mean_j (R_j f(k[j])) v[j]^T        z[i] = f(q[i]) . mean_j f(k[j])

f is the feature map, R_n an optional rotation of pairs of channels by the angles of position n (it leaves z alone), and
gain and shift are what the families differ in, with s the scale, N the tokens and e epsilon:

    normalization   gain                 shift     feature map   family
    "division"      s / max(z, e / N)    0         relu          L²ViT (arXiv:2501.16182), e = 100, s trainable
    "subtraction"   s                    1 - s z   identity      InLine (arXiv:2412.06590): the weights add up to one
    "magnitude"     s (1 + 1/(s z + e))  -s z      elu + 1       MALA (arXiv:2507.00698), rotated

Features, sums, z and the normalisation are computed in at least float32, whatever the dtype of the arguments and
whatever autocast says: sums over tokens grow beyond what float16 holds.

Shapes: B batch, N tokens, D channels a head, E those of the values.
    query, key: (B, heads, N, D)   value, out: (B, heads, N, E)   scale: (heads,)   rotary: (2, N, D/2)
    moments, the means of R f(k) v^T: (B, heads, D, E)   key_mean: (B, heads, D)   value_mean: (B, heads, E)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn_kernels.cpu import linear_attention as cpu
from visionattn_kernels.layout import empty_map
from visionattn_kernels.op import Operator, define, launcher, no_autocast, register, register_gradient, wants_plain_aten
from visionattn_kernels.ops.checks import check_epsilon, check_shape, check_tokens

NORMALIZATIONS = ("division", "subtraction", "magnitude")
FEATURE_MAPS = ("identity", "relu", "elu_plus_one")


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalization: str,
    feature_map: str = "identity",
    scale: float | Tensor | None = None,
    rotary: Tensor | None = None,
    epsilon: float = 1e-6,
) -> Tensor:
    """The definition; also what exporting uses. Arguments as of `linear_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with no_autocast(query.device.type):
        q, k, v = _features(query.to(dtype), feature_map), _features(key.to(dtype), feature_map), value.to(dtype)
        s = query.shape[-1] ** -0.5 if scale is None else scale
        s = s.to(dtype)[:, None, None] if isinstance(s, Tensor) else s
        z = q @ k.mean(2).unsqueeze(-1)
        y = _rotate(q, rotary) @ (_rotate(k, rotary).transpose(2, 3) @ v / query.shape[2])
        mean = v.mean(2, keepdim=True)
        if normalization == "division":
            out = s * y / z.clamp(min=epsilon / query.shape[2])
        elif normalization == "subtraction":
            out = s * y + (1 - s * z) * mean
        else:
            out = s * y * (1 + 1 / (s * z + epsilon)) - s * z * mean
        return out.to(query.dtype)


def _features(x: Tensor, feature_map: str) -> Tensor:
    if feature_map == "relu":
        return F.relu(x)
    return F.elu(x) + 1 if feature_map == "elu_plus_one" else x


def _rotate(x: Tensor, rotary: Tensor | None) -> Tensor:
    if rotary is None:
        return x
    (cos, sin), (first, second) = rotary.to(x.dtype).unbind(0), x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalization: str,
    feature_map: str = "identity",
    scale: float | Tensor | None = None,
    rotary: Tensor | None = None,
    epsilon: float = 1e-6,
) -> Tensor:
    """Attend from every token to all tokens, in time and memory linear in their number.

    Args:
        query: (B, heads, N, D) any strides, before the feature map.
        key: As `query`.
        value: (B, heads, N, E)
        normalization: "division", "subtraction" or "magnitude": the table above.
        feature_map: "identity", "relu" or "elu_plus_one", applied to query and key.
        scale: Factor of the products of queries and keys, one or (heads,); trainable; by default D ** -0.5.
        rotary: Cosines and sines of the angles, (2, N, D / 2), by which channels 2c and 2c + 1 of query and key turn;
            not trainable, and not with "subtraction".
        epsilon: Least divisor of "division", compared with the sum over all tokens; what "magnitude" adds to its own.

    Returns:
        (B, heads, N, E) of query's dtype, a view of (B, N, heads, E) memory, so that joining the heads copies nothing.

    Raises:
        ValueError: An argument does not fit; the message prints the value seen and the value wanted.
    """
    if normalization not in NORMALIZATIONS or feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"normalization must be one of {NORMALIZATIONS} and feature_map one of {FEATURE_MAPS}, "
            f"got {normalization!r} and {feature_map!r}"
        )
    check_epsilon(epsilon)
    _check(query, key, value, normalization, scale, rotary)
    if wants_plain_aten():
        return reference(query, key, value, normalization, feature_map, scale, rotary, epsilon)
    if not isinstance(scale, Tensor):
        dtype = torch.promote_types(query.dtype, torch.float32)
        scale = query.new_full(query.shape[1:2], query.shape[-1] ** -0.5 if scale is None else scale, dtype=dtype)
    return _forward(query, key, value, scale, rotary, normalization, feature_map, epsilon)[0]


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalization: str,
    scale: float | Tensor | None,
    rotary: Tensor | None,
) -> None:
    """Raise ValueError where the tensors do not fit together."""
    check_tokens(query, key, value)
    for name, tensor in (("scale", scale), ("rotary", rotary)):
        if isinstance(tensor, Tensor) and (not tensor.is_floating_point() or tensor.device != query.device):
            raise ValueError(f"{name} must be floating point on {query.device}, got {tensor.dtype} on {tensor.device}")
    if isinstance(scale, Tensor):
        check_shape("scale", scale, "(heads,)", query.shape[1:2])
    if rotary is not None:
        if normalization == "subtraction":
            raise ValueError("subtraction takes no rotary, with which the weights would not add up to one; got one")
        if query.shape[3] % 2:
            raise ValueError(f"rotary turns pairs of channels, so D must be even, got D={query.shape[3]}")
        check_shape("rotary", rotary, "(2, N, D / 2)", (2, query.shape[2], query.shape[3] // 2))


def _forward_fake(query, key, value, scale, rotary, normalization, feature_map, epsilon):
    """Shapes, strides and dtypes of the forward's results."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, _, dim = query.shape
    means = ((dim, value.shape[-1]), (dim,), (value.shape[-1],))
    return empty_map(value), *(query.new_empty((batch, heads, *shape), dtype=dtype) for shape in means)


def _backward_fake(grad, query, key, value, scale, rotary, moments, key_mean, value_mean, *settings):
    """Shapes, strides and dtypes of the backward's results."""
    return *(empty_map(x) for x in (query, key, value)), scale.new_empty(scale.shape)


def _plain(query, key, value, scale, rotary, normalization, feature_map, epsilon):
    """The reference, with the arguments of the op."""
    return reference(query, key, value, normalization, feature_map, scale, rotary, epsilon)


_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor scale, Tensor? rotary"
_SETTINGS = "str normalization, str feature_map, float epsilon"
_forward = define(
    "linear_attention",
    f"({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.forward,
    fake=_forward_fake,
    cuda=launcher("linear_attention", "forward"),
)
_backward = define(
    "linear_attention_backward",
    f"(Tensor grad, {_TENSORS}, Tensor moments, Tensor key_mean, Tensor value_mean, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.backward,
    fake=_backward_fake,
    cuda=launcher("linear_attention", "backward"),
)
register_gradient(_forward, _backward, _plain, keeps_result=False)
register(Operator("linear_attention", linear_attention, reference, reference))
