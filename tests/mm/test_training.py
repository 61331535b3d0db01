"""Detectors and segmenters learn on a CPU, are tested again from their checkpoint, and draw what they see."""

import json
from pathlib import Path

import cv2
import mm_predict
import mm_test
import mm_train
import pytest
import shapes

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    shapes.write(root, "train", 200, seed=0)
    shapes.write(root, "val", 24, seed=1)
    return root


def config(name: str, pictures: Path, folder: Path) -> str:
    path = folder / f"{name}.py"
    path.write_text((HERE / f"shapes_{name}.py").read_text().replace("DATA", str(pictures)))
    return str(path)


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
    path = config(name, pictures, tmp_path)
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


def test_files_that_are_not_there_are_told(capsys):
    assert mm_train.main(["nowhere.py"]) == 1
    assert mm_test.main(["nowhere.py", "nowhere.pth"]) == 1
    assert mm_predict.main(["nowhere.png", "--config", "a.py", "--checkpoint", "b.pth", "--out", "c.png"]) == 1
    assert capsys.readouterr().err.count("there is no such") == 3
