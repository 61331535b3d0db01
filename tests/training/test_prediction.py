import shutil
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image

from visionattn.training.data import UnreadablePictureError
from visionattn.training.drawing import sheet_size
from visionattn.training.model import class_names, load_model, load_published, save_model
from visionattn.training.prediction import classify, find_pictures, write_sheet, write_table

CLASSES = ["blue", "green", "red"]


@pytest.fixture
def saved(tmp_path):
    """A saved model, untrained, for grey pictures of 32 px."""
    torch.manual_seed(0)
    model = timm.create_model("test_nat", num_classes=3, in_chans=1).eval()
    config = {"input_size": (1, 32, 32), "mean": (0.2,), "std": (0.4,), "crop_pct": 1.0, "interpolation": "bilinear"}
    save_model(model, tmp_path / "saved", CLASSES, config)
    return tmp_path / "saved"


@pytest.fixture
def files(pictures):
    return sorted((pictures / "validation").rglob("*.png"))[:7]


def test_predictions_are_the_models_probabilities_in_order(saved, files):
    model = load_model(saved)
    for prediction, file in zip(classify(model, files, topk=3), files, strict=True):
        pixels = torch.tensor(list(Image.open(file).convert("L").tobytes())).view(1, 1, 32, 32) / 255
        expected = model((pixels - 0.2) / 0.4)[0].softmax(0)
        assert prediction.path == file
        assert [name for name, _ in prediction.classes] == [CLASSES[i] for i in expected.argsort(descending=True)]
        assert [value for _, value in prediction.classes] == pytest.approx(sorted(expected.tolist(), reverse=True))


def test_no_more_classes_are_returned_than_there_are(saved, files):
    model = load_model(saved)
    assert [len(p.classes) for p in classify(model, files[:1], topk=5)] == [3]
    assert [len(p.classes) for p in classify(model, files[:1], topk=1)] == [1]


def test_classes_without_saved_names_are_imagenets_or_numbers():
    assert class_names(timm.create_model("test_nat", num_classes=1000))[281].startswith("tabby")
    assert class_names(timm.create_model("test_nat", num_classes=4)) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("count", "size"), [(1, (240, 320)), (5, (1200, 320)), (7, (1200, 640))])
def test_the_sheet_is_a_png_of_the_announced_size(saved, files, tmp_path, count, size):
    sheet = tmp_path / "sheets" / "sheet.png"
    write_sheet(classify(load_model(saved), files[:count]), sheet)
    assert sheet_size(count) == size
    with Image.open(sheet) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.size == size
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 100
    assert [path.name for path in sheet.parent.iterdir()] == ["sheet.png"]


def test_names_with_the_signs_of_formulas_are_drawn(saved, files, tmp_path):
    named = shutil.copy(files[0], tmp_path / r"$x_$ \frac.png")
    (prediction,) = classify(load_model(saved), [named])
    write_sheet([replace(prediction, classes=[(r"$\frac$", 1.0)])], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=r"sheet\.gif ends in '\.gif', wanted \.png"):
        write_sheet([prediction], tmp_path / "sheet.gif")


def test_as_many_names_as_classes_are_wanted(saved, files):
    model = load_model(saved)
    model.pretrained_cfg["label_names"] = CLASSES[:2]
    with pytest.raises(ValueError, match="the model has 2 label_names for 3 classes, wanted as many"):
        classify(model, files)


def test_a_picture_that_cannot_be_read_is_named(saved, files, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(UnreadablePictureError, match=r"cannot read the picture .*broken\.png"):
        classify(load_model(saved), [*files, broken])
    with pytest.raises(UnreadablePictureError, match=r"missing\.png: No such file"):
        classify(load_model(saved), [tmp_path / "missing.png"])
    with pytest.raises(UnreadablePictureError, match=r"x\.png: .*File name too long"):
        classify(load_model(saved), find_pictures(["x" * 256 + ".png"]))


def test_nothing_to_classify_is_an_error(saved, files):
    with pytest.raises(ValueError, match="no pictures to classify"):
        classify(load_model(saved), [])
    with pytest.raises(ValueError, match="topk is 0, wanted at least 1"):
        classify(load_model(saved), files, topk=0)


def test_a_folder_without_a_model_is_an_error_that_says_what_is_missing(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"saved is not a saved model: it has no model\.safetensors"):
        load_model(saved)
    with pytest.raises(ValueError, match=r"nowhere is not a saved model: it has no config\.json"):
        load_model("nowhere")


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_weights_are_an_error_that_names_the_folder(saved, share):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cannot load the model in .*saved"):
        load_model(saved)


def test_weights_of_another_model_are_an_error(saved, tmp_path):
    other = timm.create_model("test_nat", num_classes=3, in_chans=1, dims=(16, 32, 64, 128), num_heads=(1, 2, 4, 8))
    save_model(other, tmp_path / "other", CLASSES, {})
    shutil.copy(tmp_path / "other" / "model.safetensors", saved)
    with pytest.raises(ValueError, match=r"cannot load the model in .*saved: .*does not fit NAT"):
        load_model(saved)


def test_an_unknown_model_names_the_nearest_and_one_without_weights_is_an_error():
    with pytest.raises(ValueError, match="unknown model 'nat_mimi'; the nearest known model is 'nat_mini'"):
        load_published("nat_mimi")
    with pytest.raises(ValueError, match=r"cannot load the weights of test_nat: no weights of .* are published"):
        load_published("test_nat")


def test_a_batch_predicts_what_single_pictures_do(saved, files):
    model = load_model(saved)
    single = classify(model, files, batch_size=1)
    for one, many in zip(single, classify(model, files, batch_size=3), strict=True):
        assert one.path == many.path
        assert [name for name, _ in one.classes] == [name for name, _ in many.classes]
        # Sums of a few hundred float32 terms in another order.
        assert [p for _, p in one.classes] == pytest.approx([p for _, p in many.classes], abs=1e-5)


def test_a_folder_stands_for_the_pictures_below_it(pictures, tmp_path):
    found = find_pictures([pictures / "validation", pictures / "train" / "red" / "0.png"])
    assert len(found) == 13
    assert found[:12] == sorted(found[:12])
    assert found[12].parent.name == "red"
    (tmp_path / "inner.png").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        find_pictures([tmp_path])


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_a_table_holds_paths_classes_and_probabilities(saved, files, tmp_path, ending):
    pandas = pytest.importorskip("pandas")
    if ending == "parquet":
        pytest.importorskip("pyarrow", reason="pandas writes Parquet with pyarrow")
    predictions = classify(load_model(saved), files, topk=2)
    file = tmp_path / f"out.{ending}"
    write_table(predictions, file)
    table = getattr(pandas, f"read_{ending}")(file)
    assert list(table) == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    assert list(table["path"]) == [str(path) for path in files]
    assert list(table["class_2"]) == [prediction.classes[1][0] for prediction in predictions]
    assert list(table["probability_1"]) == pytest.approx([x.classes[0][1] for x in predictions])


@pytest.mark.parametrize("place", ["a.txt/out.csv", "x" * 260 + ".csv", "x" * 245 + ".csv"])
def test_a_table_that_cannot_be_written_is_an_error_that_names_it(saved, files, tmp_path, place):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=f"^cannot write {tmp_path / place}: .*(File exists|File name too long)"):
        write_table(classify(load_model(saved), files[:1]), tmp_path / place)


def test_a_table_of_another_kind_is_an_error_and_writes_nothing(saved, files, tmp_path):
    with pytest.raises(ValueError, match=r"ends in '\.xls', wanted \.csv or \.json or \.parquet"):
        write_table(classify(load_model(saved), files[:1]), tmp_path / "out.xls")
    assert not (tmp_path / "out.xls").exists()
