"""A segmenter learns on a CPU."""

import json
from pathlib import Path

import mm_train
import shapes

HERE = Path(__file__).parent


def test_shapes_are_learned_from_random_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes.write(tmp_path, "train", 200, seed=0)
    shapes.write(tmp_path, "val", 24, seed=1)
    config = tmp_path / "upernet.py"
    config.write_text((HERE / "shapes_upernet.py").read_text().replace("DATA", str(tmp_path)))
    assert mm_train.main([str(config), "--work-dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for file in tmp_path.glob("run/*/vis_data/scalars.json") for line in file.open()]
    assert [line["mIoU"] for line in lines if "mIoU" in line][-1] >= 60


def test_a_config_that_is_not_there_is_told(capsys):
    assert mm_train.main(["nowhere.py"]) == 1
    assert "there is no such config" in capsys.readouterr().err
