"""The commands obey their config, resume what they wrote, and refuse what does not fit in a sentence."""

import shutil
from pathlib import Path

import cv2
import mm_predict
import mm_test
import mm_train
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from visionattn.openmmlab import check_fit, read_checkpoint

# A schedule whose state holds a function, and a nested description of the data.
CONFIG = """
_base_ = "PICTURES/upernet.py"
work_dir = "run"
param_scheduler = [dict(type="OneCycleLR", by_epoch=False, eta_max=0.01, total_steps=10)]
train_cfg = dict(max_iters=2, val_interval=100)
default_hooks = dict(checkpoint=dict(interval=2))
train_dataloader = dict(batch_size=2, dataset=dict(metainfo=dict(extra=dict(a=dict(b=1)))))
val_dataloader = dict(dataset=dict(indices=1))
test_dataloader = dict(dataset=dict(indices=1))
"""
OTHER_BACKBONE = '_base_ = "quick.py"\nmodel = dict(backbone=dict(model="test_van"))\n'
LESS_DEEP = '_base_ = "quick.py"\nmodel = dict(backbone=dict(depths=(1, 2, 1, 1)))\n'
OTHER_HEAD = '_base_ = "PICTURES/mask-rcnn.py"\n'


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    """A folder with quick.py, by which two iterations were trained to run/iter_2.pth."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "quick.py").write_text(CONFIG.replace("PICTURES", str(pictures)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert mm_train.main(["quick.py"]) == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch) -> Path:
    """A copy of `trained` to work in."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    (folder / "run/last_checkpoint").write_text(str(folder / "run/iter_2.pth"))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("flags", [["--resume"], ["--cfg-options", "resume=True"]], ids=["by flag", "by config"])
def test_a_run_resumes_where_the_config_says_from_all_that_it_wrote(flags, here):
    options = [] if "--cfg-options" in flags else ["--cfg-options"]
    assert mm_train.main(["quick.py", *flags, *options, "train_cfg.max_iters=4"]) == 0
    first, last = (read_checkpoint(here / f"run/iter_{i}.pth") for i in (2, 4))
    assert last["meta"]["iter"] == 4
    assert last["meta"]["dataset_meta"]["extra"] == {"a": {"b": 1}}
    assert last["param_schedulers"][0]["anneal_func"] is first["param_schedulers"][0]["anneal_func"]
    # Four steps of one run, not two of two.
    assert last["param_schedulers"][0]["_global_step"] == first["param_schedulers"][0]["_global_step"] + 2


def test_a_flag_counts_more_than_the_config_and_that_more_than_the_name(here):
    assert mm_test.main(["quick.py", "run/iter_2.pth", "--cfg-options", "work_dir=other"]) == 0
    assert mm_test.main(["quick.py", "run/iter_2.pth", "--work-dir", "flag", "--cfg-options", "work_dir=no"]) == 0
    assert list(here.glob("other/*/*.log"))
    assert list(here.glob("flag/*/*.log"))
    assert not [*here.glob("no"), *here.glob("output")]


def arguments(command, config: str, checkpoint: str) -> list[str]:
    """What a command takes to apply a checkpoint."""
    if command is mm_test:
        return [config, checkpoint]
    cv2.imwrite("picture.png", np.zeros((64, 64, 3), np.uint8))
    return ["picture.png", "--config", config, "--checkpoint", checkpoint, "--out", "seen.png"]


@pytest.mark.parametrize("command", [mm_test, mm_predict], ids=["mm_test", "mm_predict"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (OTHER_BACKBONE, "backbone.body.stages.0.blocks.0.mlp.fc1.weight"),
        (LESS_DEEP, "15 names are unknown, such as backbone.body.stages.2.blocks.1."),
        (OTHER_HEAD, "names are missing, such as neck.lateral_convs.0.conv.weight"),
    ],
    ids=["other backbone", "less deep", "other head"],
)
def test_a_checkpoint_of_another_model_is_refused(changes, told, command, here, pictures, capsys):
    (here / "other.py").write_text(changes.replace("PICTURES", str(pictures)))
    assert command.main(arguments(command, "other.py", "run/iter_2.pth")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: run/iter_2.pth: of another model: ")
    assert told in line
    assert not (here / "seen.png").exists()


@pytest.mark.parametrize("command", [mm_test, mm_predict], ids=["mm_test", "mm_predict"])
@pytest.mark.parametrize("content", [{}, [1], {"state_dict": {}}], ids=repr)
def test_a_file_without_weights_is_told_by_its_name(content, command, here, capsys):
    torch.save(content, "empty.pth")
    assert command.main(arguments(command, "quick.py", "empty.pth")) == 1
    assert "error: empty.pth: no checkpoint of a detector or segmenter" in capsys.readouterr().err


def test_what_a_trained_model_does_without_may_differ(here):
    config = Config.fromfile("quick.py")
    init_default_scope("mmseg")
    checkpoint = read_checkpoint("run/iter_2.pth")
    tensors = checkpoint["state_dict"]
    wanted = {name: x.clone() for name, x in tensors.items()}
    extra = ("teacher.backbone.w", "data_preprocessor.mean", "decode_head.loss_decode.class_weight")
    tensors.update({name: torch.ones(4) for name in extra})
    for name in [name for name in tensors if name.endswith("num_batches_tracked")]:
        del tensors[name]
    torch.save(checkpoint, "extra.pth")
    torch.save({f"module.{name}": x for name, x in tensors.items()}, "bare.pth")
    for file in ("extra.pth", "bare.pth"):
        model = MODELS.build(config.model)
        check_fit(model, file)
        assert all(torch.equal(x, wanted[name]) for name, x in model.state_dict().items() if name in tensors)
    config.model.auxiliary_head = None
    check_fit(MODELS.build(config.model), "extra.pth")


@pytest.mark.parametrize(
    ("name", "content"), [("text.png", b"no picture"), ("empty.png", b""), ("cut.png", None), ("folder", None)]
)
def test_what_is_no_picture_is_told(name, content, here, capsys):
    given = arguments(mm_predict, "quick.py", "run/iter_2.pth")
    if name == "folder":
        Path(name).mkdir()
    else:
        Path(name).write_bytes(Path("picture.png").read_bytes()[:40] if content is None else content)
    assert mm_predict.main([name, *given[1:]]) == 1
    told = "there is no such file, but a folder" if name == "folder" else "not read, since it is no picture"
    assert f"error: {name}: {told}" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["run", "seen.xyz", "seen"])
def test_where_nothing_can_be_drawn_is_told_before_the_model_is_there(out, here, capsys):
    given = arguments(mm_predict, "quick.py", "quick.py")
    assert mm_predict.main([*given[:-1], out]) == 1
    assert f"error: --out must be a file with an ending such as .png or .jpg, got {out}" in capsys.readouterr().err


def test_a_training_without_end_or_start_is_told(here, capsys):
    assert mm_train.main(["quick.py", "--cfg-options", "train_cfg=None"]) == 1
    assert "error: train_cfg must say how long to train, got None" in capsys.readouterr().err
    torch.save({"state_dict": {}}, here / "run/iter_2.pth")
    assert mm_train.main(["quick.py", "--resume"]) == 1
    assert "iter_2.pth: no checkpoint of a training to resume" in capsys.readouterr().err


def test_a_run_that_recorded_no_seed_resumes(here):
    checkpoint = read_checkpoint("run/iter_2.pth")
    del checkpoint["meta"]["seed"]
    torch.save(checkpoint, "run/iter_2.pth")
    assert mm_train.main(["quick.py", "--resume", "--cfg-options", "train_cfg.max_iters=3"]) == 0


def test_processes_that_would_train_apart_are_refused(here, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert mm_train.main(["quick.py"]) == 1
    assert "error: 2 processes would train apart" in capsys.readouterr().err
