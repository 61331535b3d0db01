"""Whole models on the CPU, beside models that everybody knows, with three tenths to spare for noise."""

import pytest

from visionattn.benchmark import time_models

pytestmark = pytest.mark.speed

NOISE = 0.7


def test_nat_and_dinat_mini_cost_little_more_than_resnet50():
    _, *ours = time_models(["resnet50", "nat_mini", "dinat_mini"], rounds=5)
    for model in ours:
        assert model.forward_ratio <= 1.5 / NOISE, model
        assert model.step_ratio <= 1.4 / NOISE, model


def test_biformer_tiny_costs_no_more_than_resnet50():
    _, ours = time_models(["resnet50", "biformer_tiny"], rounds=3)
    assert ours.forward_ratio <= 1.05 / NOISE
    assert ours.step_ratio <= 1 / NOISE


def test_halonet26t_costs_no_more_than_timms():
    _, ours = time_models(["halonet26t", "halonet26t_va"], size=256, rounds=3)
    assert max(ours.forward_ratio, ours.step_ratio) <= 1 / 0.97 / NOISE, ours
    # Memory has no noise.
    assert ours.memory_ratio <= 1, ours


def test_nat_tiny_trains_faster_than_swin_small_of_the_same_accuracy():
    _, ours = time_models(["swin_small_patch4_window7_224", "nat_tiny"], rounds=5)
    assert ours.step_ratio <= 0.75 / NOISE
