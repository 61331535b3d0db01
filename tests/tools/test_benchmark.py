"""The benchmark measures what it says, and refuses to time what is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from benchmark import main

from visionattn.benchmark import time_models
from visionattn_kernels import benchmark
from visionattn_kernels.baselines import BASELINES, SHAPES
from visionattn_kernels.testing import CASES, check, neighborhood

BENCHMARK = Path(__file__).parents[2] / "tools/benchmark.py"
SMALL = neighborhood(1, 2, 16, 16, 8, kernel_size=5, bias=True)


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        for _ in range(3):
            torch.empty(1000, dtype=torch.float64).add(1)

    assert 16000 <= benchmark.peak_memory(call) < 17000


def test_interleaved_calls_take_turns_and_the_first_round_does_not_count():
    turns, clock = [], iter(range(100))
    calls = {name: lambda name=name: turns.append(name) for name in "ab"}
    assert benchmark.interleaved(calls, rounds=2, clock=lambda: next(clock)) == {"a": 1, "b": 1}
    assert turns == ["a", "b"] * 3


@pytest.mark.parametrize("op", sorted(BASELINES))
def test_baselines_are_right(op):
    check(SHAPES[op][0] if op != "neighborhood_attention" else SMALL, BASELINES[op])


@pytest.mark.parametrize("op", BASELINES)
def test_the_layout_of_the_models_changes_no_value(op):
    case = CASES[op][0]
    projected, plain = benchmark.projected(case), case.tensors()
    for name in plain:
        assert torch.equal(projected[name], plain[name]), name
    laid_out = op in ("linear_attention", "flow_attention", "routed_attention")
    assert (projected["value"].stride() != plain["value"].stride()) == laid_out


def test_every_baseline_has_shapes_and_belongs_to_an_operator():
    assert set(BASELINES) == set(SHAPES) <= set(CASES)


def test_a_wrong_operator_is_not_timed(monkeypatch):
    monkeypatch.setitem(
        BASELINES, SMALL.op, lambda query, key, value, kernel_size, bias: query + value + bias.sum() + key
    )
    with pytest.raises(AssertionError, match="error of out is"):
        benchmark.compare(SMALL)


def test_operators_are_compared_with_their_baseline(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, SMALL.op, [SMALL])
    assert main(["op", SMALL.op, "--rounds", "1", "--threads", str(torch.get_num_threads())]) == 0
    assert re.search(r"1x2x16x16x8 kernel_size=5 bias +[\d.]+ ms, [\d.]+x", capsys.readouterr().out)


def test_models_are_compared_with_the_first(capsys):
    arguments = ["test_resnet", "test_nat", "--size", "64", "--rounds", "1", "--threads", str(torch.get_num_threads())]
    assert main(["model", *arguments]) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"test_resnet +\d+ ms, 1\.00 +\d+ ms, 1\.00 +\d+ MiB, 1\.00", first)
    assert re.fullmatch(r"test_nat +\d+ ms, [\d.]+ +\d+ ms, [\d.]+ +\d+ MiB, [\d.]+", second)


def test_memory_of_a_step_is_that_of_gradients_and_activations():
    (small,), (large,) = (time_models(["test_nat"], batch, 64, 1) for batch in (1, 4))
    weights = sum(x.numel() for x in timm.create_model("test_nat").parameters()) * 4
    # Gradients stay the same where activations grow with the batch.
    assert weights < small.memory < large.memory < 4 * small.memory


def test_growth_is_printed_and_drawn(tmp_path, capsys):
    names, plot = ["linear_attention", "region_routes", "test_nat"], tmp_path / "growth.png"
    arguments = ["--sides", "32", "64", "--rounds", "1", "--threads", str(torch.get_num_threads()), "--plot", str(plot)]
    assert main(["growth", *names, *arguments]) == 0
    printed = capsys.readouterr().out
    for name in names:
        assert re.search(rf"{name}: time grows like pixels\^[-\d.]+, memory like pixels\^[\d.]+\n +32 px", printed)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_features_of_large_images_are_measured(capsys):
    arguments = ["--sizes", "64x64", "128x192", "--rounds", "1", "--threads", str(torch.get_num_threads())]
    assert main(["features", "test_nat", *arguments]) == 0
    header, row, _ = capsys.readouterr().out.splitlines()[-3:]
    assert header.split("gradients")[1].split()[:2] == ["64x64", "128x192"]
    assert re.fullmatch(r"test_nat +[\d.]+ s, \d+ MiB +[\d.]+ s, \d+ MiB +-?[\d.]+, [\d.]+", row)


PROPORTIONAL = ["van_b0", "nat_mini", "ulsam_mobilenetv2", "ela_b_resnet18"]


def features_of_a_detectors_images(name, rounds):
    """Largest memory in MiB, and the exponents of the pixels by which time and memory grow: 2 is the square."""
    # A process of its own, since the tool keeps what the process frees.
    command = [sys.executable, BENCHMARK, "features", name, "--sizes", "512x512", "800x1333"]
    output = subprocess.run(
        [*command, "--rounds", rounds, "--threads", "1"], capture_output=True, text=True, check=True
    )
    return map(float, re.search(r"(\d+) MiB +([\d.]+), ([\d.]+)$", output.stdout, re.M).groups())


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPORTIONAL)
def test_features_of_a_detectors_images_take_memory_in_proportion_to_their_pixels(name):
    memory, _, memory_growth = features_of_a_detectors_images(name, "1")
    assert memory_growth <= 1.2
    assert memory < 6 * 2**10


@pytest.mark.speed
@pytest.mark.parametrize("name", PROPORTIONAL)
def test_features_of_a_detectors_images_take_time_in_proportion_to_their_pixels(name):
    _, time_growth, _ = features_of_a_detectors_images(name, "5")
    assert time_growth <= 1.2


def test_slope_is_the_exponent_of_the_pixels():
    assert benchmark.slope({side: 3.0 * side**4 for side in (8, 16, 32)}) == pytest.approx(2)
    with pytest.raises(ValueError, match="two sides or more"):
        benchmark.slope({8: 1.0})


@pytest.mark.parametrize(("argv", "message"), [(["op", "na"], "got 'na'"), (["model", "nat_nano"], "nat_nano")])
def test_unknown_names_are_told(argv, message, capsys):
    assert main([*argv, "--threads", str(torch.get_num_threads())]) == 1
    assert message in capsys.readouterr().err
