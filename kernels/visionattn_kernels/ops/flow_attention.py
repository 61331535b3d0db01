"""Flow attention: linear attention in which keys compete for the queries' attention, as flows that are conserved.

    in[i]     = (f(q[i]) + e) . (sum_j f(k[j]) + e) + e                what query i takes in
    out[j]    = (f(k[j]) + e) . (sum_i f(q[i]) + e) + e                what key j gives out
    sink[i]   = (f(q[i]) + e) . (sum_j f(k[j]) / out[j] + e) + e       the same, every key giving out one
    source[j] = (f(k[j]) + e) . (sum_i f(q[i]) / in[i] + e) + e        the same, every query taking in one
    result[i] = sigmoid(sink[i]) / in[i] f(q[i]) . sum_j f(k[j]) (N softmax_j(clamp(source)) v[j])^T

f is the sigmoid, e epsilon, N the number of tokens, and sources are clamped between -1 and 1. Paper: Flowformer
(arXiv:2202.06258). Everything inside is computed in at least float32, whatever the dtype of the arguments and whatever
autocast says: sums over tokens grow beyond what float16 holds.

Shapes: B batch, N tokens, D channels a head, E those of the values.
    query, key: (B, heads, N, D)   value, result: (B, heads, N, E)   moments, the sum above: (B, heads, D, E)
    sums, of f(q), f(k), f(q) / in and f(k) / out: (B, heads, 4, D)   partition, that of the softmax: (B, heads)
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn_kernels.cpu import flow_attention as cpu
from visionattn_kernels.layout import empty_map
from visionattn_kernels.op import Operator, define, launcher, no_autocast, register, register_gradient, wants_plain_aten
from visionattn_kernels.ops.checks import check_epsilon, check_tokens


def reference(query: Tensor, key: Tensor, value: Tensor, epsilon: float = 1e-6) -> Tensor:
    """The definition; also what exporting uses. Arguments as of `flow_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with no_autocast(query.device.type):
        q, k, v = query.to(dtype).sigmoid(), key.to(dtype).sigmoid(), value.to(dtype)

        def flow(features: Tensor, others: Tensor) -> Tensor:
            total = others.sum(2).unsqueeze(-1) + epsilon
            return (features + epsilon) @ total + epsilon

        taken, given = flow(q, k), flow(k, q)
        sink, source = flow(q, k / given), flow(k, q / taken).clamp(-1, 1)
        moments = k.transpose(2, 3) @ (v * source.softmax(2) * query.shape[2])
        return (q @ moments * (sink.sigmoid() / taken)).to(query.dtype)


def flow_attention(query: Tensor, key: Tensor, value: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Attend from every token to all tokens with conserved flows, in time and memory linear in their number.

    Args:
        query: (B, heads, N, D) any strides, before the sigmoid.
        key: As `query`.
        value: (B, heads, N, E)
        epsilon: What keeps flows from zero.

    Returns:
        (B, heads, N, E) of query's dtype, a view of (B, N, heads, E) memory, so that joining the heads copies nothing.

    Raises:
        ValueError: An argument does not fit; the message prints the value seen and the value wanted.
    """
    check_epsilon(epsilon)
    check_tokens(query, key, value)
    if wants_plain_aten():
        return reference(query, key, value, epsilon)
    return _forward(query, key, value, epsilon)[0]


def _forward_fake(query, key, value, epsilon):
    """Shapes, strides and dtypes of the forward's results."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    dim = query.shape[3]
    inner = ((dim, value.shape[3]), (4, dim), ())
    return empty_map(value), *(query.new_empty((*query.shape[:2], *shape), dtype=dtype) for shape in inner)


def _backward_fake(grad, query, key, value, moments, sums, partition, epsilon):
    """Shapes, strides and dtypes of the backward's results."""
    return tuple(empty_map(x) for x in (query, key, value))


_forward = define(
    "flow_attention",
    "(Tensor query, Tensor key, Tensor value, float epsilon) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.forward,
    fake=_forward_fake,
    cuda=launcher("flow_attention", "forward"),
)
_backward = define(
    "flow_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor moments, Tensor sums, Tensor partition, "
    "float epsilon) -> (Tensor, Tensor, Tensor)",
    cpu=cpu.backward,
    fake=_backward_fake,
    cuda=launcher("flow_attention", "backward"),
)
register_gradient(_forward, _backward, reference, keeps_result=False)
register(Operator("flow_attention", flow_attention, reference, reference))
