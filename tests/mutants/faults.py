"""Seeded faults: one piece of code each, what it becomes, and the tests that must notice."""

from typing import NamedTuple

CPU = "kernels/visionattn_kernels/cpu"
OPS = "kernels/visionattn_kernels/ops"
TRITON = "kernels/visionattn_kernels/triton"
LAYERS = "visionattn/layers"
BACKBONES = "visionattn/backbones"


class Fault(NamedTuple):
    """A fault by name: in `path`, the only place that reads `before` reads `after`; `tests` are arguments of pytest."""

    name: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]


def budget(operator: str) -> tuple[str, ...]:
    """The error budget of an operator."""
    test = "test_results_and_gradients_stay_within_the_error_budget"
    return f"tests/kernels/test_operators.py::{test}", "-k", f"{operator} and float64"


def interpreter(operator: str, case: str) -> tuple[str, ...]:
    """A case of an operator's kernels, in the interpreter."""
    return "-m", "kernels", "tests/kernels/test_triton_interpreter.py", "-k", f"{operator} and {case}"


def answer(name: str) -> tuple[str, ...]:
    """The reference answer of a model."""
    return "tests/backbones/test_reference_answers.py", "-k", f"authors and {name}"


DEFINITION = ("tests/kernels/test_neighborhood_attention.py::test_reference_is_the_sum_over_the_window",)
EXPORTED = (
    "tests/kernels/test_operators.py::test_the_decomposition_stays_within_the_error_budget",
    "-k",
    "neighborhood_attention",
)
FORWARD_MODE = ("tests/kernels/test_operators.py::test_derivatives_in_forward_mode_are_those_of_the_reference",)
TWICE = ("tests/kernels/test_operators.py::test_second_derivatives_are_those_of_the_reference",)
ATTENTION = budget("neighborhood_attention")
AGGREGATE = budget("neighborhood_aggregate")
ROUTED = budget("routed_attention")
ROUTED_PATHS = ("tests/kernels/test_routed_attention.py::test_the_dense_and_the_copying_path_agree",)
ROUTES = ("tests/kernels/test_routed_attention.py::test_routes_are_the_regions_whose_mean_keys_fit_best",)
HALO = budget("halo_attention")
LINEAR = budget("linear_attention")
FLOW = budget("flow_attention")
SMALL_MAPS = ("tests/backbones/test_neighborhood_families.py", "-k", "small_map")
GATED = ("tests/backbones/test_ela.py", "-k", "gated")
ATTENTION_KERNELS = interpreter("neighborhood_attention", "1x1x9x9x8")
AGGREGATE_KERNELS = interpreter("neighborhood_aggregate", "1x1x12x9")
ROUTED_KERNELS = interpreter("routed_attention", "1x3x25x1x8")
HALO_KERNELS = interpreter("halo_attention", "2x2x10x11x12")
LINEAR_KERNELS = interpreter("linear_attention", "2x2x101x16")
CLAMPED_KERNELS = interpreter("linear_attention", "2x1x13x8")
FLOW_KERNELS = interpreter("flow_attention", "1x2x53x8")
EPSILON_KERNELS = interpreter("flow_attention", "3x1x7x8")
ROUNDED_KERNELS = ("-m", "kernels", "tests/kernels/test_triton_flow_attention.py", "-k", "bfloat16")
WIDE_KERNELS = ("-m", "kernels", "tests/kernels/test_triton_linear_attention.py", "-k", "wide")

# By file: name, before, after, tests.
_FAULTS = {
    f"{OPS}/windows.py": [
        ("window one to the right", "stride + stride // 2, last)", "stride + stride // 2 + 1, last)", DEFINITION),
        ("window leaves the map", "last + 1 - kernel)", "last + 2 - kernel)", DEFINITION),
        ("even window leans right", "(centre - kernel // 2)", "(centre - (kernel - 1) // 2)", DEFINITION),
        ("stride ignored", "places // stride * stride + stride // 2", "places", DEFINITION),
        ("window one key short", "(place < start + kernel)", "(place < start + kernel - 1)", DEFINITION),
        ("relative bias mirrored", "place - place[:, None] + kernel", "place[:, None] - place + kernel", DEFINITION),
        ("block one key short", "stride + kernel - 2, device", "stride + kernel - 3, device", EXPORTED),
        (
            "block past its residue",
            "torch.arange(size, device=device), members - 1)",
            "torch.arange(size, device=device), members)",
            EXPORTED,
        ),
    ],
    f"{CPU}/tiles.py": [
        ("relative bias transposed", "bias.flatten(1), bias.new_full", "bias.mT.flatten(1), bias.new_full", ATTENTION),
        ("last image dropped", "in range(0, lead[0], batch_step)", "in range(0, lead[0] - 1, batch_step)", ATTENTION),
        ("longer residues dropped", "([(0, longer)] if longer else [])", "[]", ATTENTION),
        ("last tile dropped", "if whole < len(fresh):", "if False:", ATTENTION),
        ("covered columns counted twice", "tiles[:, :, :, tile, ..., :left, :] = 0", "pass", ATTENTION),
    ],
    f"{CPU}/neighborhood_attention.py": [
        ("scale missing from d(query)", "(grad_scores @ tile_k).mul_(scale)", "(grad_scores @ tile_k)", ATTENTION),
        ("scale missing from d(key)", "    queries *= scale\n", "    queries = queries * 1\n", ATTENTION),
        ("covered rows counted twice", "        grads[..., top:fresh, :, :] = 0\n", "", ATTENTION),
        ("mask of another row of tiles", "grad_mask[pattern] += grad_scores", "grad_mask[0] += grad_scores", ATTENTION),
        ("d(bias) of one residue alone", "grad_bias += entries[:", "grad_bias[:] = entries[:", ATTENTION),
    ],
    f"{CPU}/neighborhood_aggregate.py": [
        ("weights outside the window", "weights.new_zeros(shape, dtype", "weights.new_ones(shape, dtype", AGGREGATE),
        ("covered rows of weights counted twice", "grads[..., : cover.rows.fresh[row], :, :] = 0", "pass", AGGREGATE),
        (
            "d(weights) subtracted",
            "grad_w[..., rows, columns, :, :] += band",
            "grad_w[..., rows, columns, :, :] -= band",
            AGGREGATE,
        ),
    ],
    "kernels/visionattn_kernels/op.py": [
        (
            "tangents dropped",
            "return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0",
            "return False",
            FORWARD_MODE,
        ),
        ("second derivative of the op", "if torch.is_grad_enabled():", "if False:", TWICE),
    ],
    f"{OPS}/routed_attention.py": [
        ("worst regions chosen", ".topk(topk).indices", ".topk(topk, largest=False).indices", ROUTES),
        ("keys choose queries", "(q @ k.transpose(1, 2)).topk", "(k @ q.transpose(1, 2)).topk", ROUTES),
    ],
    f"{CPU}/routed_attention.py": [
        ("mask without its logarithm", "return named.log_()", "return named", ROUTED),
        ("d(key) of regions overwritten", "transpose(1, 2).index_add_(", "transpose(1, 2).index_copy_(", ROUTED),
        ("parts one over the other", "whole[first:last] = x", "whole[: last - first] = x", ROUTED_PATHS),
        ("last route dropped", "yield some, rows[some]", "yield some, rows[some][:, :1]", ROUTED),
        (
            "routes into the first image",
            "(routes + torch.arange(0, batch * per_image, per_image)[:, None, None])",
            "routes",
            ROUTED,
        ),
    ],
    f"{CPU}/halo_attention.py": [
        ("halo missing on the left", "[column * size - halo for", "[column * size for", HALO),
        ("tables swapped", '"bnhijd,ird->bnhijr", q, tables[0]', '"bnhijd,ird->bnhijr", q, tables[1]', HALO),
        ("ones outside the map", "squares = x.new_zeros(", "squares = x.new_ones(", HALO),
        ("d(key) of blocks overwritten", "parts[1], *at_keys, add=True", "parts[1], *at_keys", HALO),
        (
            "d(query) without columns",
            'grad_q += torch.einsum("bnhijs,jsd->bnhijd", grad_by_column, tables[1])',
            "pass",
            HALO,
        ),
    ],
    f"{CPU}/linear_attention.py": [
        ("divisor without its floor", "rule.scale / z.clamp(min=rule.floor)", "rule.scale / z", LINEAR),
        ("slope below the floor", "(gain * by_scale).mul_(z >= rule.floor).neg_()", "(gain * by_scale).neg_()", LINEAR),
        ("gradient turned forward", "turns[some].conj_physical() if back", "turns[some] if back", LINEAR),
        ("sum of keys for their mean", "add_(features.sum(1), alpha=share)", "add_(features.sum(1))", LINEAR),
        ("slope of a positive feature", "features.clamp(max=1)", "features", LINEAR),
        ("gradients of sums, not of means", "(x.div_(q.shape[2]) for x in grad_means)", "grad_means", LINEAR),
    ],
    f"{CPU}/flow_attention.py": [
        ("slope beyond the clamp", " * (source.abs() <= 1)", "", FLOW),
        ("competition not averaged", "moment *= (tokens / part)", "moment *= (1 / part)", FLOW),
        ("gate without its slope", "along * gate * (1 - gate) / taken", "along * gate / taken", FLOW),
    ],
    f"{TRITON}/windows.py": [
        (
            "kernel's window one key long",
            "(key[0] < start_y + KERNEL[0])",
            "(key[0] <= start_y + KERNEL[0])",
            ATTENTION_KERNELS,
        ),
        (
            "last block dropped",
            "columns = tl.cdiv(end[1] - start[1], BLOCK[1])",
            "columns = (end[1] - start[1]) // BLOCK[1]",
            ATTENTION_KERNELS,
        ),
    ],
    f"{TRITON}/softmax.py": [
        ("sums not rescaled", "total = total * shrink + tl.sum", "total = total + tl.sum", ATTENTION_KERNELS),
        ("lse without its sum", "(highest + tl.log2(total)) * LN2", "highest * LN2", ATTENTION_KERNELS),
    ],
    f"{TRITON}/neighborhood_attention_kernels.py": [
        ("delta missing", "(weights * (grad_weights - delta[:, None]))", "(weights * grad_weights)", ATTENTION_KERNELS),
        (
            "scale missing from the kernel's d(key)",
            "grad_key_ptr, grad_key * scale",
            "grad_key_ptr, grad_key",
            ATTENTION_KERNELS,
        ),
        ("lse stored beyond the map", "lse, mask=inside)\n\n\n", "lse)\n\n\n", ATTENTION_KERNELS),
    ],
    f"{TRITON}/neighborhood_aggregate_kernels.py": [
        ("weights of a row too many", "(row < KERNEL[0])", "(row <= KERNEL[0])", AGGREGATE_KERNELS),
        ("weights numbered by columns", "row * KERNEL[1] + column", "row + column * KERNEL[0]", AGGREGATE_KERNELS),
        (
            "d(value) by the weights of the key",
            "_entries(weights_ptr, across(near), down(own)",
            "_entries(weights_ptr, down(own), across(near)",
            AGGREGATE_KERNELS,
        ),
    ],
    f"{TRITON}/routed_attention_kernels.py": [
        ("first route read for all", "list_ptr + number // tokens,", "list_ptr + number * 0,", ROUTED_KERNELS),
        (
            "sources of regions before it too",
            "count = (tl.load(bound_ptr + 1) - start) * tokens",
            "count = tl.load(bound_ptr + 1) * tokens",
            ROUTED_KERNELS,
        ),
        (
            "delta of another token",
            "member_pointers(delta_ptr, near,",
            "member_pointers(delta_ptr, own,",
            ROUTED_KERNELS,
        ),
    ],
    f"{TRITON}/halo_attention_kernels.py": [
        (
            "window one row too low",
            "corner[0] * SIZE - HALO + within[0]",
            "corner[0] * SIZE - HALO + 1 + within[0]",
            HALO_KERNELS,
        ),
        ("keys above the map loaded", "seen & (places[0] >= 0) & (places[1]", "seen & (places[1]", HALO_KERNELS),
        (
            "keys beyond the map draw nothing",
            "seen = number < window * window\n",
            "seen = (number < window * window) & before(places, size)\n",
            HALO_KERNELS,
        ),
        ("relative rows by columns", "_in_order(by_row, within[0],", "_in_order(by_row, within[1],", HALO_KERNELS),
        (
            "d(width) by rows",
            "width_ptr, sums_ptr + table_size, within[1]",
            "width_ptr, sums_ptr + table_size, within[0]",
            HALO_KERNELS,
        ),
        (
            "last relative positions dropped",
            "range(0, SPAN, ENTRIES)",
            "range(0, SPAN - ENTRIES, ENTRIES)",
            HALO_KERNELS,
        ),
        (
            "scale missing from the blocks' d(query)",
            "grad_by_row, query, grad_query * scale,",
            "grad_by_row, query, grad_query,",
            HALO_KERNELS,
        ),
        (
            "first block that holds the key left out",
            "tl.maximum(top - HALO, 0) // SIZE",
            "top // SIZE",
            interpreter("halo_attention", "1x1x9x12x128"),
        ),
        (
            "last queries of a block dropped",
            "pieces: tl.constexpr = (QUERIES * QUERIES + BLOCK - 1) // BLOCK",
            "pieces: tl.constexpr = QUERIES * QUERIES // BLOCK",
            HALO_KERNELS,
        ),
    ],
    f"{TRITON}/tokens.py": [
        (
            "last piece of tokens dropped",
            "for piece in range(pieces):",
            "for piece in range(pieces - 1):",
            LINEAR_KERNELS,
        ),
        ("rest left out", "product = tl.dot(a, rest_b, product)", "pass", WIDE_KERNELS),
        ("size not put back", "product * (size_a * size_b)", "product * size_a", WIDE_KERNELS),
    ],
    f"{TRITON}/linear_attention.py": [
        (
            "sums instead of means",
            "sum_launch(piece, mean, 1 / query.shape[2])",
            "sum_launch(piece, mean, 1.0)",
            LINEAR_KERNELS,
        ),
        ("epsilon of sums compared with means", "epsilon / query.shape[2] if", "epsilon if", CLAMPED_KERNELS),
    ],
    f"{TRITON}/linear_attention_kernels.py": [
        (
            "features of what is not there summed",
            "tl.where(inside[:, None], features, 0.0)",
            "features",
            LINEAR_KERNELS,
        ),
        (
            "gradient of the query not turned back",
            "grad_query, rotary_ptr, places, inside, tokens, True",
            "grad_query, rotary_ptr, places, inside, tokens, False",
            LINEAR_KERNELS,
        ),
        (
            "mean value with the wrong sign backward",
            "by_z, by_value = scale * by_scaled_z, -z * scale",
            "by_z, by_value = scale * by_scaled_z, z * scale",
            LINEAR_KERNELS,
        ),
    ],
    f"{TRITON}/flow_attention.py": [
        (
            "sum instead of the mean of what competes",
            "sum_launch(means, mean, 1 / tokens)",
            "sum_launch(means, mean, 1.0)",
            FLOW_KERNELS,
        ),
        (
            "moments of odds that add up to one",
            "moments, float(tokens), partition",
            "moments, 1.0, partition",
            FLOW_KERNELS,
        ),
    ],
    f"{TRITON}/flows.py": [
        (
            "features of what is not there",
            "exists = inside[:, None]\n",
            "exists = inside[:, None] | True\n",
            FLOW_KERNELS,
        ),
        ("features of channels that are not there", "if DIM < BLOCK_D:", "if DIM < 0:", FLOW_KERNELS),
        ("epsilon of one channel", "tl.sum(total, 0) + DIM * epsilon", "tl.sum(total, 0) + epsilon", EPSILON_KERNELS),
        ("epsilon missing backward", " + epsilon * tl.sum(weights, 0)", "", EPSILON_KERNELS),
        ("odds unclamped", "tl.exp(tl.minimum(tl.maximum(source, -1.0), 1.0))", "tl.exp(source)", FLOW_KERNELS),
        ("the kernel's slope beyond the clamp", "inside & (tl.abs(source) <= 1)", "inside", FLOW_KERNELS),
        ("sources of what is not there", "inside & (tl.abs(source) <= 1)", "tl.abs(source) <= 1", EPSILON_KERNELS),
        ("mean not taken off", "(along - tl.load(mean_ptr + head))", "along", FLOW_KERNELS),
        ("gradient of features", "gradient * features * (1 - features)", "gradient", FLOW_KERNELS),
    ],
    f"{TRITON}/flow_attention_kernels.py": [
        (
            "odds of what is not there",
            "tl.where(inside, odds_of(flow_of(features, of_taken, inside, epsilon, DIM)), 0.0)",
            "odds_of(flow_of(features, of_taken, inside, epsilon, DIM))",
            FLOW_KERNELS,
        ),
        (
            "queries over the flow of queries",
            "flow_of(query, of_k, inside",
            "flow_of(query, of_q, inside",
            FLOW_KERNELS,
        ),
        ("gate without what it divides by", "by_taken = -(along + tl.sum", "by_taken = -(tl.sum", FLOW_KERNELS),
        (
            "weighted features in 16 bits",
            "wide_dot(tl.trans(features * odds[:, None]), values, dtype, True, False)",
            "wide_dot(tl.trans(features * odds[:, None]), values, dtype, False, False)",
            ROUNDED_KERNELS,
        ),
        (
            "moments in 16 bits backward",
            "tl.trans(matrix), ptr.dtype.element_ty, False, True)",
            "tl.trans(matrix), ptr.dtype.element_ty, False, False)",
            ROUNDED_KERNELS,
        ),
    ],
    f"{LAYERS}/conv.py": [
        (
            "gradient of a kernel from another sample",
            "grad.unsqueeze(2), strict=True)",
            "grad.roll(1, 0).unsqueeze(2), strict=True)",
            ("tests/layers/test_conv.py",),
        ),
        ("kernel not flipped backward", "weight.flip(2, 3)", "weight", ("tests/layers/test_conv.py",)),
    ],
    f"{LAYERS}/neighborhood.py": [
        ("scale of all heads", "(dim // num_heads) ** -0.5", "dim**-0.5", answer("nat_mini")),
        (
            "padding before the map",
            "shortfall(width, extent), 0, shortfall(height, extent)]",
            "shortfall(width, extent), shortfall(height, extent), 0]",
            SMALL_MAPS,
        ),
    ],
    f"{LAYERS}/ulsam.py": [
        ("softmax over subspaces", "scores.flatten(2).softmax(-1)", "scores.flatten(2).softmax(1)", answer("ulsam"))
    ],
    f"{LAYERS}/ela.py": [("gate left out", "return x * rows.unsqueeze(3) * columns", "return x * columns", GATED)],
    f"{BACKBONES}/biformer.py": [
        (
            "scale of one head",
            "self.scale = dim**-0.5",
            "self.scale = (dim // num_heads) ** -0.5",
            answer("biformer_tiny"),
        ),
        ("position from the result", "out + self.lepe(value)", "out + self.lepe(out)", answer("biformer_tiny")),
    ],
    f"{BACKBONES}/van.py": [("gate not applied", "return x * self.mix(", "return self.mix(", answer("van_b0"))],
    f"{BACKBONES}/l2vit.py": [("clamp ignored", "epsilon=clamp)", "epsilon=1.0)", answer("l2vit_tiny"))],
    f"{BACKBONES}/mala.py": [
        (
            "angles of rows and columns swapped",
            "torch.cat([rows, columns]",
            "torch.cat([columns, rows]",
            answer("mala"),
        ),
    ],
    f"{BACKBONES}/_agent.py": [
        (
            "agents without their scale",
            "agents.transpose(2, 3) * self.scale",
            "agents.transpose(2, 3)",
            answer("agent_pvt"),
        ),
        ("table of gathering for giving", "self._fit(self.na_bias,", "self._fit(self.an_bias,", answer("agent_pvt")),
    ],
    f"{BACKBONES}/inline.py": [
        (
            "kernel from the mean behind the norm",
            "self.attn(self.norm1(x), x.mean([1, 2]))",
            "self.attn(self.norm1(x))",
            answer("inline_cswin"),
        ),
    ],
}

FAULTS = [Fault(name, path, *rest) for path, faults in _FAULTS.items() for name, *rest in faults]
