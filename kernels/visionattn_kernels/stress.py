"""Linear and flow attention where half precision gives out: queries of length 1,000 and 65,536 tokens.

    python -m visionattn_kernels.stress

prints, for every family and dtype, the relative error of the authors' formula evaluated in that dtype, and of the
operator, against the reference in float64 on the same numbers: the largest of the result and the gradients, "nan" where
one is not finite. The last column is the largest share that the operator takes of the error budget of the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from visionattn_kernels.baselines import BASELINES
from visionattn_kernels.op import OPS
from visionattn_kernels.testing import Case, error_budget, evaluate, flow, linear, relative_error, widened

HALF = (torch.float16, torch.bfloat16)
LENGTH, TOKENS = 1e3, 65536

# fmt: off
CASES = {
    "InLine": linear(1, 1, TOKENS, 32, normalization="subtraction"),
    "MALA": linear(1, 1, TOKENS, 32, normalization="magnitude", feature_map="elu_plus_one"),
    "L²ViT": linear(1, 1, TOKENS, 32, normalization="division", feature_map="relu", epsilon=100.0),
    "Flowformer": flow(1, 1, TOKENS, 32),
}
# fmt: on


@dataclass(frozen=True)
class Row:
    """A family's attention in one dtype.

    Attributes:
        family: Who published it.
        dtype: That of arguments and results.
        authors: Relative error of the authors' formula, infinite where a result is not finite.
        ours: The same of the operator.
        share: Error of the operator over its budget, in the result where that is largest.
    """

    family: str
    dtype: torch.dtype
    authors: float
    ours: float
    share: float


def measure(dtype: torch.dtype) -> list[Row]:
    """One row a family."""
    return [_row(family, case, dtype) for family, case in CASES.items()]


def _row(family: str, case: Case, dtype: torch.dtype) -> Row:
    operator = OPS[case.op]
    tensors = case.tensors()
    tensors["query"] = LENGTH * tensors["query"] / tensors["query"].norm(dim=-1, keepdim=True)
    tensors = widened(tensors, dtype)
    want = evaluate(operator.reference, case, widened(tensors))
    authors, ours = (
        {name: relative_error(x, want[name]) for name, x in evaluate(call, case, tensors).items()}
        for call in (BASELINES[case.op], operator.call)
    )
    budget = error_budget(case, tensors, want, operator.reference)
    share = max(ours[name] / budget[name] for name in want)
    return Row(family, dtype, max(authors.values()), max(ours.values()), share)


def main() -> int:
    """Print the table."""
    print(f"|q| = {LENGTH:.0f}, N = {TOKENS}\n{'family':<12}{'dtype':<10}{'authors':>10}{'ours':>10}{'of budget':>12}")
    for row in (row for dtype in HALF for row in measure(dtype)):
        authors, ours = (f"{error:.1e}" if math.isfinite(error) else "nan" for error in (row.authors, row.ours))
        print(f"{row.family:<12}{str(row.dtype)[6:]:<10}{authors:>10}{ours:>10}{row.share:>12.0%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
