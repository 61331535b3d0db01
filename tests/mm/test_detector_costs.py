"""What a whole detector costs."""

from pathlib import Path

import pytest

from visionattn.benchmark import cost_features

CONFIGS = Path(__file__).parents[2] / "configs/mmdet"


@pytest.mark.parametrize("name", ["mask-rcnn_van-b2_1x_coco.py", "retinanet_van-b2_1x_coco.py"])
def test_a_detector_costs_what_its_weights_and_activations_take(name):
    cost = cost_features(str(CONFIGS / name), [(128, 160), (256, 320)], rounds=1)
    assert cost.own > 4 * 26_000_000  # bytes of the backbone alone
    assert 4 * 3 * 256 * 320 < cost.memory[256, 320] < 6 * 2**30
    assert cost.memory[128, 160] < cost.memory[256, 320]
    assert cost.seconds.keys() == cost.memory.keys()
