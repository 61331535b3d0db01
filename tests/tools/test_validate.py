import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import validate as tool
from PIL import Image
from training.generated import write_pictures

from visionattn.training.model import save_model
from visionattn.training.validation import Accuracy, class_outputs, published_top1, real_labels, validate

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


class ByColour(torch.nn.Module):
    """Says the class whose channel is brightest; its outputs stand in the order of `classes`."""

    in_chans = 3

    def __init__(self, classes: list[str], channels: list[int]) -> None:
        super().__init__()
        self.pretrained_cfg = {"label_names": classes, **CONFIG}
        self.num_classes, self.channels = len(classes), channels
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return 10 * images.mean((2, 3))[:, self.channels]


@pytest.fixture
def folder(tmp_path):
    """4 pictures of each colour, and a fifth red one in the folder of the blue."""
    write_pictures(tmp_path / "val", per_class=4)
    (tmp_path / "val" / "red" / "3.png").rename(tmp_path / "val" / "blue" / "wrong.png")
    return tmp_path / "val"


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_picture_counts_once_in_whatever_order_the_model_has_its_classes(folder, batch_size):
    model = ByColour(["red", "blue", "green"], [0, 2, 1])
    found = validate("colours", model, folder, batch_size=batch_size, workers=0)
    assert found.count == 12
    assert found.top1 == pytest.approx(100 * 11 / 12)
    assert found.top5 == 100


def test_only_the_classes_of_the_folder_compete(folder):
    # The fourth output would win everywhere.
    class Biased(ByColour):
        def forward(self, images):
            return torch.cat([super().forward(images), torch.full((len(images), 1), 1e6)], 1)

    model = Biased(["red", "blue", "green", "violet"], [0, 2, 1])
    assert validate("colours", model, folder, workers=0).top1 == pytest.approx(100 * 11 / 12)


def test_the_test_size_can_be_another(folder):
    found = validate("colours", ByColour(["red", "blue", "green"], [0, 2, 1]), folder, size=48, workers=0)
    assert found.input_size == (3, 48, 48)
    assert found.top1 == pytest.approx(100 * 11 / 12)


def test_class_folders_mean_names_or_wordnet_ids_or_numbers_and_not_their_order():
    model = timm.create_model("test_nat")
    assert class_outputs(model, ["n01440764", "n01443537", "n15075141"]) == [0, 1, 999]
    assert class_outputs(model, ["0", "1", "10", "2"]) == [0, 1, 10, 2]
    with pytest.raises(ValueError, match="'cat' is none of the model's 1000 classes"):
        class_outputs(model, ["0", "cat"])


def test_real_labels_leave_out_pictures_without_one_and_accept_any_of_several(tmp_path):
    labels = real_labels()
    none = next(name for name, right in labels.items() if not right)
    several = next(name for name, right in labels.items() if len(right) > 1)
    for name in (none, several):
        (tmp_path / "n01440764").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "n01440764" / f"{name}.JPEG")

    class Constant(ByColour):
        def forward(self, images):
            return torch.nn.functional.one_hot(torch.tensor(labels[several][1]), 1000).float().expand(len(images), -1)

    model = Constant([], [])
    model.pretrained_cfg, model.num_classes = {**CONFIG, "num_classes": 1000}, 1000
    found = validate("constant", model, tmp_path, workers=0, real=True)
    assert (found.count, found.top1, found.loss) == (1, 100.0, None)


def test_the_published_accuracy_comes_from_the_registry():
    assert published_top1("nat_mini") == 81.8
    assert published_top1("resnet18") is None
    assert published_top1("output/run/best") is None


def test_reproduced_means_at_most_a_tenth_of_a_percent_off():
    found = Accuracy("x", 10, 81.7, 95.0, 1.0, (3, 32, 32), 1.0, 1.0, published_top1=81.8)
    assert found.reproduced
    assert not replace(found, top1=81.69).reproduced
    assert not replace(found, top1=81.91).reproduced
    assert not replace(found, published_top1=None).reproduced


@pytest.fixture
def saved(tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(len(name))
        save_model(timm.create_model("test_nat", num_classes=3), tmp_path / name, ["blue", "green", "red"], CONFIG)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_the_tool_prints_and_writes_a_row_a_model(folder, saved, tmp_path, capsys, ending):
    out = tmp_path / f"out.{ending}"
    assert tool.main([str(folder), "--checkpoint", *saved, "--workers", "0", "--out", str(out)]) == 0
    assert [line.partition(": top-1 ")[0] for line in capsys.readouterr().out.splitlines()] == saved
    with out.open() as file:
        rows = json.load(file) if ending == "json" else list(csv.DictReader(file))
    assert [row["model"] for row in rows] == saved
    assert [int(row["count"]) for row in rows] == [12, 12]


def test_the_tool_fails_where_an_accuracy_is_not_reproduced_or_nothing_is_asked(folder, saved, capsys):
    arguments = [str(folder), "--checkpoint", saved[0], "--workers", "0", "--reproduce"]
    assert tool.main(arguments) == 1
    assert "published is unknown" in capsys.readouterr().err
    assert tool.main([str(folder)]) == 1
    assert capsys.readouterr().err == "error: no model to validate, wanted --checkpoint or --model\n"
    assert tool.main(["nowhere", "--checkpoint", saved[0]]) == 1
    assert capsys.readouterr().err == "error: nowhere is not a folder\n"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--size", "0"], "size is 0, wanted at least 1"),
        (["--crop-pct", "-1"], "crop_pct is -1.0, wanted above 0, at most 1"),
        (["--crop-pct", "50"], "crop_pct is 50.0, wanted above 0, at most 1"),
        (["--crop-pct", "nan"], "crop_pct is nan, wanted above 0, at most 1"),
        (["--batch-size", "0"], "batch_size is 0, wanted at least 1"),
        (["--out", "results.xlsx"], "results.xlsx ends in '.xlsx', wanted .csv or .json"),
    ],
)
def test_what_cannot_be_used_is_an_error_before_anything_is_measured(folder, saved, capsys, extra, message):
    assert tool.main([str(folder), "--checkpoint", *saved, "--workers", "0", *extra]) == 1
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_a_checkpoint_that_fails_costs_no_result_of_those_before_it(folder, saved, capsys):
    assert tool.main([str(folder), "--checkpoint", saved[0], "nowhere", "--workers", "0"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{saved[0]}: top-1 ")
    assert err.startswith("error: nowhere is not a saved model")


def test_a_folder_without_pictures_or_with_some_in_no_class_is_an_error_that_says_so(folder, tmp_path):
    model = ByColour(["red", "blue", "green"], [0, 2, 1])
    for empty in (tmp_path / "empty", tmp_path / "classes"):
        (empty / "red").mkdir(parents=True)
        with pytest.raises(ValueError, match=f"^no pictures in {empty}, wanted files in .jpg"):
            validate("colours", model, empty, workers=0)
    (folder / "red" / "0.png").rename(folder / "stray.png")
    with pytest.raises(ValueError, match=f"^{folder} holds pictures itself, wanted them in one folder for each class$"):
        validate("colours", model, folder, workers=0)


def test_the_parts_of_a_data_set_are_not_counted_together(folder, tmp_path):
    write_pictures(tmp_path / "train", per_class=2)
    with pytest.raises(ValueError, match=r"train/blue and .*/val/blue are class folders of one name"):
        validate("colours", ByColour(["red", "blue", "green"], [0, 2, 1]), tmp_path, workers=0)
