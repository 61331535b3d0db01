import subprocess
import sys

import predict
import pytest
import timm
import torch
from PIL import Image

from visionattn.training.model import save_model


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_nat", num_classes=3)
    config = {"input_size": (3, 32, 32), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    save_model(model, tmp_path / "best", ["blue", "green", "red"], config)
    return str(tmp_path / "best")


@pytest.fixture
def image(tmp_path):
    file = tmp_path / "a picture.jpg"
    Image.new("RGB", (60, 40), (200, 30, 30)).save(file)
    return str(file)


def test_prediction_prints_a_line_a_picture_and_draws_the_sheet(saved, image, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert predict.main([image, image, "--checkpoint", saved, "--topk", "2", "--sheet", str(sheet)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{image}: ")
    shares = [float(word.rstrip("%")) for word in lines[0].removeprefix(image).split() if word.endswith("%")]
    assert len(shares) == 2
    assert 100 / 3 <= shares[0] <= 100
    assert shares[0] >= shares[1]
    with Image.open(sheet) as picture:
        assert picture.size == (480, 320)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "error: cannot read the picture missing.png: No such file"),
        (["--table", "out.xls"], "error: out.xls ends in '.xls', wanted .csv or .json or .parquet"),
        (["--sheet", "s.jpg"], "error: s.jpg ends in '.jpg', wanted .png"),
        (["--topk", "0"], "error: topk is 0, wanted at least 1"),
        (["--checkpoint", "nowhere"], "error: nowhere is not a saved model: it has no config.json"),
        (["--model", "nat_mimi"], "error: unknown model 'nat_mimi'; the nearest known model is 'nat_mini'"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_status_one(saved, image, tmp_path, capsys, arguments, message):
    sheet = tmp_path / "sheet.png"
    model = [] if {"--checkpoint", "--model"} & set(arguments) else ["--checkpoint", saved]
    assert predict.main(["--sheet", str(sheet), image, *arguments, *model]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert out == ""
    assert not sheet.exists()


def test_the_tool_runs_as_a_command(saved, image):
    command = [sys.executable, predict.__file__, image, "--checkpoint", saved]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.startswith(f"{image}: ")
    assert answer.stderr == ""
