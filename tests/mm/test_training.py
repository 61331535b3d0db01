"""Detectors and segmenters learn on a CPU, are tested again from their checkpoint, and draw what they see."""

import json
from pathlib import Path

import cv2
import mm_predict
import mm_test
import mm_train
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from visionattn.openmmlab import read_checkpoint


def scalars(work: Path) -> dict[str, float]:
    """The last value of everything that a run logged."""
    lines = [json.loads(line) for file in sorted(work.glob("*/vis_data/scalars.json")) for line in file.open()]
    return {name: value for line in lines for name, value in line.items()}


@pytest.mark.parametrize(
    ("name", "metric", "least"),
    [("mask-rcnn", "coco/bbox_mAP_50", 0.5), ("upernet", "mIoU", 60.0)],
    ids=["boxes and masks", "classes"],
)
def test_shapes_are_learned_from_random_weights(name, metric, least, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(pictures / f"{name}.py")
    assert mm_train.main([path, "--work-dir", str(tmp_path / "run")]) == 0
    assert scalars(tmp_path / "run")[metric] >= least
    checkpoint = (tmp_path / "run" / "last_checkpoint").read_text()
    picture, out = pictures / "val" / "0.png", tmp_path / "seen.png"
    arguments = [str(picture), "--config", path, "--checkpoint", checkpoint, "--out", str(out)]
    assert mm_predict.main(arguments) == 0
    before, after = cv2.imread(str(picture)), cv2.imread(str(out))
    assert (cv2.resize(after, before.shape[1::-1]) != before).any()
    capsys.readouterr()
    assert mm_test.main([path, checkpoint, "--work-dir", str(tmp_path / "test")]) == 0
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if line.startswith(metric + ":"))
    assert float(printed[metric]) == pytest.approx(scalars(tmp_path / "run")[metric], abs=0.01)


@HOOKS.register_module()
class Interruption(Hook):
    """Ends a run as Ctrl-C does, in the middle of its fourth iteration."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3:
            raise KeyboardInterrupt


# Both validate right after the checkpoint from which they resume.
BY_ITERATION = """
_base_ = "PICTURES/upernet.py"
model = dict(backbone=dict(drop_path_rate=0.3))
train_cfg = dict(max_iters=5, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
custom_hooks = [dict(type="EMAHook", momentum=0.1)]
train_dataloader = dict(batch_size=2, num_workers=WORKERS, persistent_workers=WORKERS > 0)
"""
BY_EPOCH = """
_base_ = "PICTURES/mask-rcnn.py"
model = dict(backbone=dict(drop_path_rate=0.3))
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=2, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1, by_epoch=True))
train_dataloader = dict(
    batch_size=2,
    num_workers=WORKERS,
    persistent_workers=WORKERS > 0,
    sampler=dict(type="DefaultSampler"),
    dataset=dict(indices=4),
)
"""


@pytest.mark.parametrize(
    ("changes", "workers"),
    [(BY_ITERATION, 0), (BY_ITERATION, 2), (BY_EPOCH, 1)],
    ids=["iterations", "iterations, two workers", "epochs, a worker"],
)
def test_an_interrupted_run_resumes_bit_by_bit(changes, workers, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, whole, resumed = tmp_path / "short.py", tmp_path / "whole", tmp_path / "resumed"
    common = "val_dataloader = dict(dataset=dict(indices=1))\nrandomness = dict(seed=None)\n"
    path.write_text(changes.replace("PICTURES", str(pictures)).replace("WORKERS", str(workers)) + common)
    arguments = [str(path), "--work-dir", str(resumed)]
    with pytest.raises(KeyboardInterrupt):
        mm_train.main([*arguments, "--cfg-options", "default_hooks.interruption.type=Interruption"])
    seed = read_checkpoint((resumed / "last_checkpoint").read_text())["meta"]["seed"]
    assert mm_train.main([*arguments, "--resume"]) == 0
    assert mm_train.main([str(path), "--work-dir", str(whole), "--cfg-options", f"randomness.seed={seed}"]) == 0
    ends = [read_checkpoint((work / "last_checkpoint").read_text()) for work in (resumed, whole)]
    assert ends[0]["param_schedulers"] == ends[1]["param_schedulers"]
    assert ("ema_state_dict" in ends[1]) == ("EMAHook" in changes)
    for part in (lambda end: end["state_dict"], lambda end: end.get("ema_state_dict", {}), moments):
        torch.testing.assert_close(*(part(end) for end in ends), rtol=0, atol=0)


def moments(checkpoint: dict) -> dict:
    return checkpoint["optimizer"]["state"]


def test_files_that_are_not_there_are_told(capsys):
    assert mm_train.main(["nowhere.py"]) == 1
    assert mm_test.main(["nowhere.py", "nowhere.pth"]) == 1
    assert mm_predict.main(["nowhere.png", "--config", "a.py", "--checkpoint", "b.pth", "--out", "c.png"]) == 1
    assert capsys.readouterr().err.count("there is no such") == 3
