"""Cases for the kernels alone: what the cases of all operators leave out, because on the CPU it makes no difference."""

from visionattn_kernels.testing import CASES, Case, aggregate, flow, halo, linear, neighborhood, routed
from visionattn_kernels.triton.evidence import OPERATORS

TARGETED: dict[str, list[Case]] = {
    "neighborhood_attention": [
        neighborhood(1, 1, 12, 9, 128, kernel_size=5, bias=True),
        neighborhood(1, 1, 9, 11, 104, kernel_size=(3, 4)),
        neighborhood(1, 2, 9, 17, 64, kernel_size=(9, 2), bias=True),
        neighborhood(1, 1, 18, 10, 32, kernel_size=(6, 5), stride=(6, 4), dilation=(3, 1), bias=True),
        neighborhood(1, 1, 5, 17, 16, kernel_size=(1, 17), bias=True, scale=-0.5),
        neighborhood(1, 1, 19, 1, 16, kernel_size=(2, 1), dilation=(9, 1), bias=True),
    ],
    "neighborhood_aggregate": [
        aggregate(1, 1, 12, 9, 128, kernel_size=5),
        aggregate(2, 2, 9, 9, 40, kernel_size=(4, 7), dilation=(2, 1)),
        aggregate(1, 1, 17, 1, 64, kernel_size=(17, 1)),
    ],
    "halo_attention": [
        halo(1, 1, 9, 12, 128, 40, block_size=8, halo_size=3),
        halo(2, 2, 5, 6, 24, 104, block_size=5, halo_size=1),
        halo(1, 1, 9, 20, 64, block_size=16, halo_size=2, stride=2, scale=-0.2),
        halo(1, 1, 7, 13, 16, block_size=12, halo_size=3),
    ],
    "routed_attention": [
        routed(1, 1, 3, 21, 128, topk=2),
        routed(1, 1, 3, 70, 104, topk=2),
    ],
    "linear_attention": [
        linear(1, 1, 70, 128, normalization="magnitude", feature_map="elu_plus_one", rotary=True),
        linear(1, 2, 70, 104, 40, normalization="division", feature_map="relu", epsilon=100.0, scale=True),
        linear(1, 1, 33, 16, 128, normalization="subtraction", feature_map="elu_plus_one"),
    ],
    "flow_attention": [
        flow(1, 1, 70, 128),
        flow(1, 2, 70, 104, 40, epsilon=0.01),
        flow(1, 1, 33, 16, 128),
    ],
}

# What runs in the interpreter: every operator with kernels.
INTERPRETED = [case for operator in OPERATORS for case in CASES[operator] + TARGETED[operator]]
