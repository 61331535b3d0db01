import csv
import json
import os
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy
from training.generated import TINY, write_pictures

from visionattn.training.baselines import score_baselines
from visionattn.training.config import ModelConfig, load_config
from visionattn.training.folder import RunFolder
from visionattn.training.loop import evaluate, train, train_one_epoch
from visionattn.training.run import Run, mixed_precision

# Everything that draws random numbers or carries state from one update to the next.
EVERYTHING = (
    "schedule.epochs=4",
    "schedule.warmup_epochs=1",
    "data.workers=1",
    "model.kwargs.drop_path_rate=0.2",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.erasing=0.5",
    "optimizer.accumulate=2",
    "optimizer.clip_grad=1.0",
    "label_smoothing=0.1",
    "ema_decay=0.9",
)


def flat(state, prefix="") -> dict:
    """A checkpoint as {path: leaf}."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    leaves = {}
    for key, value in items:
        nested = isinstance(value, (dict, list, tuple))
        leaves |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


def read_summary(run: Run) -> list[dict[str, float]]:
    with (run.folder.path / "summary.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A finished run with averaged weights, for tests that only look at it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    overrides = ("schedule.epochs=8", "ema_decay=0.9", "examples=4", "baselines=true")
    return train(load_config(folder / "tiny.yaml", (f"data.root={pictures}", f"output={folder / 'run'}", *overrides)))


# What a run leaves behind


def test_a_run_learns_and_writes_a_row_an_epoch(trained):
    rows = read_summary(trained)
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert rows[-1]["val_loss"] < 0.5 * rows[0]["val_loss"]
    assert rows[-1]["val_top1"] > 90
    assert rows[-1]["ema_top1"] > 90


def test_the_metrics_are_those_of_the_run_and_one_object_an_epoch(trained):
    lines = (trained.folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == trained.history
    for row, rounded in zip(trained.history, read_summary(trained), strict=True):
        assert row == pytest.approx(rounded, rel=1e-5)


def test_the_folder_holds_what_was_asked_and_what_ran(trained):
    folder = trained.folder.path
    start = json.loads((folder / "environment.json").read_text())[0]
    assert start["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert start["command"]
    assert "best: " in (folder / "train.log").read_text()
    assert "schedule:" in (folder / "config.yaml").read_text()
    with Image.open(folder / "curves.png") as curves:
        assert curves.size == (1100, 450)
    assert sorted(path.name.partition("_")[0] for path in (folder / "examples").iterdir()) == [
        "blue",
        "blue",
        "green",
        "red",
    ]
    assert not list(folder.rglob("*.part"))


def test_the_best_model_loads_through_timm_alone(trained):
    best = timm.create_model(f"local-dir:{trained.folder.best}", pretrained=True).eval()
    config = resolve_data_config(model=best)
    assert best.num_classes == 3
    assert best.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert config["input_size"] == (3, 32, 32)
    assert tuple(config["mean"]) == tuple(trained.data_config["mean"])
    assert config["crop_pct"] == 1.0
    images = torch.stack([create_transform(**config)(trained.val.picture(i)[0]) for i in range(len(trained.val))])
    labels = torch.tensor([trained.val.picture(i)[1] for i in range(len(trained.val))])
    right = (best(images).argmax(1) == labels).double().mean().item()
    assert 100 * right == pytest.approx(max(row["ema_top1"] for row in read_summary(trained)), rel=1e-5)


@pytest.mark.parametrize(("folder", "prefix"), [("last", "val"), ("last_ema", "ema")])
def test_weights_and_their_average_load_through_timm_and_score_what_was_logged_of_each(trained, folder, prefix):
    model = timm.create_model(f"local-dir:{trained.folder.path / folder}", pretrained=True).eval()
    images, labels = zip(*(trained.val[position] for position in range(len(trained.val))), strict=True)
    labels, newest = torch.tensor(labels), trained.history[-1]
    with torch.no_grad():
        logits = model(torch.stack(images))
    assert newest[f"{prefix}_top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert newest[f"{prefix}_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert newest["val_loss"] != pytest.approx(newest["ema_loss"], rel=1e-3)


def test_the_card_of_the_best_model_says_what_was_measured_and_anybody_may_read_the_weights(trained):
    card = (trained.folder.best / "README.md").read_text()
    best = max(trained.history, key=lambda row: row["ema_top1"])
    assert "# test_nat on " in card
    assert "measured on 12 validation pictures" in card
    assert (
        f"averaged weights after epoch {best['epoch']} of 8, chosen by this figure | {best['ema_top1']:.2f} |" in card
    )
    assert "| 1-nearest-neighbour on the pixels | 100.00 |" in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card
    modes = {(trained.folder.best / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1


def test_the_baselines_separate_coloured_pictures(trained):
    assert trained.baselines == {"1-nearest-neighbour": 100.0, "logistic regression": 100.0}
    assert score_baselines(trained.val, trained.val) == trained.baselines
    assert "baseline on the same split: 1-nearest-neighbour 100.0 %" in (trained.folder.path / "train.log").read_text()


# Resuming


def stop_after(monkeypatch, checkpoints: int) -> None:
    """Lets a training write so many checkpoints and then interrupts it."""
    save_last, written = RunFolder.save_last, []

    def save_and_stop(folder, state):
        save_last(folder, state)
        written.append(state)
        if len(written) == checkpoints:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_last", save_and_stop)


# An epoch is three batches, of which two make an update: with a checkpoint after each, every second lies within it.
@pytest.mark.parametrize(
    ("extra", "checkpoints", "within"),
    [((), 2, False), (("checkpoint_every=1",), 1, True), (("checkpoint_every=1",), 5, True)],
    ids=["after an epoch", "within the first", "within the third"],
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    configure, tmp_path, monkeypatch, extra, checkpoints, within
):
    given = (*EVERYTHING, *extra)
    whole = train(configure(*given, f"output={tmp_path / 'whole'}"))
    with monkeypatch.context() as patch:
        stop_after(patch, checkpoints)
        with pytest.raises(KeyboardInterrupt):
            train(configure(*given))
    assert bool(RunFolder(configure().output).load_last()["within"]) == within
    resumed = train(configure(*given, "resume=true"))

    expected, found = flat(whole.folder.load_last()), flat(resumed.folder.load_last())
    assert expected.keys() == found.keys()
    timings = ("seconds", "images_per_second")
    for key in (key for key in expected if not key.endswith(timings)):
        both = expected[key], found[key]
        assert torch.equal(*both) if isinstance(both[0], torch.Tensor) else both[0] == both[1], key
    assert (resumed.folder.best / "model.safetensors").read_bytes() == (
        whole.folder.best / "model.safetensors"
    ).read_bytes()
    assert len(json.loads((resumed.folder.path / "environment.json").read_text())) == 2
    log = (resumed.folder.path / "train.log").read_text()
    assert (" and 2 batches" in log) == within
    metrics = (resumed.folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in metrics] == [1, 2, 3, 4]


def test_resuming_a_finished_run_trains_no_further(configure):
    before = train(configure("resume=auto")).folder.load_last()
    after = train(configure("resume=auto")).folder.load_last()
    assert after["history"] == before["history"]


def test_a_run_resumes_on_its_own_data_alone(configure, tmp_path):
    write_pictures(tmp_path / "moved" / "train", per_class=8)
    write_pictures(tmp_path / "moved" / "validation", per_class=4, seed=1)
    moved = (f"data.root={tmp_path / 'moved'}", "schedule.epochs=1")
    train(configure(*moved))
    (tmp_path / "moved" / "train" / "red" / "7.png").unlink()
    with pytest.raises(ValueError, match="its data had training pictures: 24, that of now has 23"):
        Run(configure(*moved, "resume=true"))
    for part in ("train", "validation"):
        (tmp_path / "moved" / part / "red").rename(tmp_path / "moved" / part / "apple")
    with pytest.raises(
        ValueError, match=r"its data had classes: \['blue', 'green', 'red'\], that of now has \['apple'"
    ):
        Run(configure(*moved, "resume=true"))


def test_a_folder_that_holds_a_run_is_not_overwritten(configure):
    run = train(configure("schedule.epochs=1"))
    before = run.folder.last.read_bytes()
    with pytest.raises(ValueError, match="already holds a run; wanted resume=true"):
        train(configure("schedule.epochs=1"))
    with pytest.raises(ValueError, match=r"it has optimizer.lr=0.002, asked is 0.1"):
        train(configure("schedule.epochs=1", "optimizer.lr=0.1", "resume=true"))
    assert run.folder.last.read_bytes() == before


def kept(run: Run) -> dict[int, int]:
    """The checkpoints that a run kept, {epoch of its name: epochs of its content}."""
    paths = (run.folder.path / "checkpoints").glob("*")
    return {int(path.stem): len(torch.load(path, weights_only=True)["history"]) for path in paths}


def test_no_checkpoint_is_kept_beside_the_last_unless_asked(trained):
    assert not (trained.folder.path / "checkpoints").exists()


def test_the_checkpoints_of_the_best_and_the_last_epochs_are_kept_and_a_run_goes_on_from_one(
    configure, tmp_path, monkeypatch
):
    scores = iter([10.0, 40.0, 20.0, 40.0, 30.0, 25.0])
    with monkeypatch.context() as patch:
        patch.setattr(
            "visionattn.training.loop.evaluate", lambda run, model: {"val_loss": 1.0, "val_top1": next(scores)}
        )
        run = train(configure("schedule.epochs=6", "keep_best=2", "keep_last=1"))
    # Of two equally good ones both count, and the earlier is best/.
    assert kept(run) == {2: 2, 4: 4, 6: 6}

    shutil.copyfile(run.folder.path / "checkpoints" / "0002.pt", run.folder.last)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(configure("schedule.epochs=6", "keep_last=3", "resume=true"))
    assert kept(run) == {2: 2, 4: 4, 6: 6}
    again = train(configure("schedule.epochs=6", "keep_last=3", "resume=true"))
    assert kept(again) == {4: 4, 5: 5, 6: 6}
    assert [row["val_top1"] for row in again.history[:2]] == [10.0, 40.0]
    assert torch.load(again.folder.path / "checkpoints" / "0006.pt")["updates"] == 18


def test_a_kill_between_the_last_checkpoint_and_its_copy_loses_neither(configure, monkeypatch):
    keep = ("schedule.epochs=3", "keep_last=2")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(configure(*keep))
    run = train(configure(*keep, "resume=true"))
    assert kept(run) == {2: 2, 3: 3}


def test_a_copy_that_does_not_fit_removes_no_older_checkpoint(configure, monkeypatch):
    def fill_up(source, target):
        target.write_bytes(source.read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    run = train(configure("schedule.epochs=1", "keep_last=1"))
    monkeypatch.setattr("visionattn.training.folder.shutil.copyfile", fill_up)
    with pytest.raises(ValueError, match=r"cannot write .*0002\.pt: .*No space left"):
        run.folder.keep(2, {2})
    assert kept(run) == {1: 1}
    with pytest.raises(ValueError, match="No space left"):
        run.folder.keep(1, {1})
    assert kept(run) == {1: 1}


def test_an_output_that_is_a_file_is_an_error(configure, tmp_path):
    with pytest.raises(ValueError, match=r"output .*tiny\.yaml is a file, wanted a folder"):
        Run(configure(f"output={tmp_path / 'tiny.yaml'}"))


def test_an_output_that_cannot_be_a_folder_is_an_error(configure, tmp_path):
    for output, reason in ((tmp_path / "tiny.yaml" / "run", "Not a directory"), ("x" * 256, "File name too long")):
        with pytest.raises(ValueError, match=f"^output {output} cannot be a folder: {reason}$"):
            Run(configure(f"output={output}"))


def test_resuming_nothing_is_an_error(configure, tmp_path):
    with pytest.raises(ValueError, match=r"nothing to resume: .*last\.pt does not exist"):
        train(configure("resume=true"))
    assert not (tmp_path / "run").exists()


def test_a_truncated_or_foreign_checkpoint_is_an_error_that_names_it(configure):
    run = train(configure("schedule.epochs=1"))
    whole = run.folder.last.read_bytes()
    run.folder.last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*last\.pt"):
        train(configure("schedule.epochs=1", "resume=true"))
    torch.save(timm.create_model("test_resnet").state_dict(), run.folder.last)
    with pytest.raises(ValueError, match=r"last\.pt is not a checkpoint of test_nat"):
        train(configure("schedule.epochs=1", "resume=true"))


def test_a_checkpoint_with_a_changed_byte_anywhere_is_an_error(configure):
    run = train(configure("schedule.epochs=1"))
    whole = run.folder.last.read_bytes()
    damaged = bytearray(whole)
    for place in (len(whole) // 4, 3 * len(whole) // 4):
        damaged[place] ^= 255
    run.folder.last.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*last\.pt: its part .* is damaged"):
        run.folder.load_last()
    rng = np.random.default_rng(0)
    for place in (*range(60), *range(len(whole) - 60, len(whole)), *rng.integers(len(whole), size=40)):
        damaged = bytearray(whole)
        damaged[place] ^= 255
        run.folder.last.write_bytes(damaged)
        with suppress(ValueError):
            found = flat(run.folder.load_last())  # of a byte that says nothing, such as padding
            assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in both(found, flat(run.state())))


def both(first: dict, second: dict) -> list[tuple]:
    """The values of two dictionaries with the same keys."""
    assert first.keys() == second.keys()
    return [(first[key], second[key]) for key in first]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read the checkpoint .*: File is not a zip file"),
        (b"epoch 1", "cannot read the checkpoint .*: File is not a zip file"),
        ([1], "cannot read the checkpoint .*: it holds a list, wanted the state of a run"),
        ({"model": {}}, "is not a checkpoint of test_nat: it has no 'optimizer'"),
        ({"model": 1}, "is not a checkpoint of test_nat: its model is of type int, wanted dict"),
        ({"optimizer": None}, "is not a checkpoint of test_nat: its optimizer is of type NoneType, wanted dict"),
        ({"optimizer": {}}, "is not a checkpoint of test_nat"),
        ({"history": None}, "is not a checkpoint of test_nat: its history is of type NoneType, wanted list"),
        ({"ema": None}, "is not a checkpoint of test_nat"),
    ],
)
def test_a_checkpoint_of_another_content_is_an_error_that_says_which(configure, content, message):
    run = Run(configure("ema_decay=0.9"))
    run.folder.describe(run.config)
    if isinstance(content, bytes):
        run.folder.last.write_bytes(content)
    else:
        whole = content != {"model": {}} and isinstance(content, dict)
        run.folder.save_last(run.state() | content if whole else content)
    with pytest.raises(ValueError, match=message) as error:
        Run(configure("ema_decay=0.9", "resume=true"))
    assert "\n" not in str(error.value)


def test_a_run_whose_best_model_is_gone_says_so_before_it_goes_on(configure, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(configure())
    folder = RunFolder(configure().output)
    shutil.rmtree(folder.best)
    with pytest.raises(ValueError, match=r"cannot resume .*run: .*best has no model\.safetensors"):
        train(configure("resume=true"))
    shutil.copytree(folder.path / "last", folder.best)
    train(configure("resume=true"))


@pytest.mark.parametrize("content", ["", "{}"])
def test_a_list_of_starts_that_is_none_is_named_and_nothing_is_replaced(configure, content):
    folder = RunFolder(configure().output)
    folder.path.mkdir()
    (folder.path / "environment.json").write_text(content)
    with pytest.raises(ValueError, match=r"environment\.json.*, wanted a list in JSON or no such file"):
        train(configure())
    assert not (folder.path / "config.yaml").exists()


# Two runs in one folder


def test_a_second_run_in_the_folder_of_one_at_work_is_refused(configure):
    with RunFolder(configure().output).locked(), pytest.raises(ValueError, match=r"another run is at work in .*/run"):
        train(configure())
    assert [path.name for path in RunFolder(configure().output).path.iterdir()] == ["run.lock"]
    train(configure("schedule.epochs=1"))


def test_a_run_that_began_while_another_ended_does_not_overwrite_it(configure, monkeypatch):
    locked = RunFolder.locked

    def wait(folder):
        monkeypatch.setattr(RunFolder, "locked", locked)
        train(configure("schedule.epochs=1"))
        return locked(folder)

    monkeypatch.setattr(RunFolder, "locked", wait)
    with pytest.raises(ValueError, match="already holds a run"):
        train(configure("schedule.epochs=2"))


def test_a_killed_run_leaves_its_folder_free_even_while_its_workers_live(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with RunFolder(tmp_path).locked():
            if worker := os.fork():
                os.write(writer, b"%d" % worker)
            time.sleep(60)
            os._exit(0)
    worker = int(os.read(reader, 20))
    try:
        with pytest.raises(ValueError, match="another run is at work"), RunFolder(tmp_path).locked():
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with RunFolder(tmp_path).locked():
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


# The loop


def test_the_averaged_weights_follow_every_update(configure):
    run = Run(configure("ema_decay=0.9"))
    expected = {name: value.clone() for name, value in run.bare_model.state_dict().items()}
    reference = ModelEmaV3(run.bare_model, decay=0.9, use_warmup=True)

    def average(meter):
        decay = reference.get_decay(run.updates)
        for name, value in run.bare_model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value

    train_one_epoch(run, 0, on_update=average)
    assert run.updates == 3
    for name, value in run.ema.module.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name
    assert any(not torch.equal(value, run.bare_model.state_dict()[name]) for name, value in expected.items())


def weights_after_an_epoch(config) -> tuple[torch.Tensor, torch.Tensor, int]:
    run = Run(config)
    before = torch.nn.utils.parameters_to_vector(run.bare_model.parameters()).detach().clone()
    train_one_epoch(run, 0)
    return before, torch.nn.utils.parameters_to_vector(run.bare_model.parameters()).detach(), run.updates


def test_accumulated_gradients_equal_those_of_the_larger_batch(configure):
    sgd = ("optimizer.name=sgd", "optimizer.weight_decay=0", "optimizer.lr=0.1", "schedule.name=constant")
    start, large, updates = weights_after_an_epoch(configure(*sgd, "data.batch_size=8"))
    _, small, updates_too = weights_after_an_epoch(configure(*sgd, "data.batch_size=4", "optimizer.accumulate=2"))
    assert updates == updates_too == 3
    # Sums of at most 8 pictures x 64 positions in another order: sqrt(512) * 2^-24 of the update, times ten for the
    # three updates that build on each other.
    assert (large - small).norm() < 10 * 512**0.5 * 2**-24 * (large - start).norm()


def test_clipping_bounds_the_step(configure):
    sgd = (
        "optimizer.name=momentum",
        "optimizer.weight_decay=0",
        "optimizer.kwargs.momentum=0",
        "schedule.name=constant",
    )
    one_update = ("data.batch_size=24", "optimizer.lr=1.0", "schedule.warmup_epochs=0")
    start, free, _ = weights_after_an_epoch(configure(*sgd, *one_update))
    _, clipped, _ = weights_after_an_epoch(configure(*sgd, *one_update, "optimizer.clip_grad=0.01"))
    assert (free - start).norm() > 0.02
    assert (clipped - start).norm() == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_is_stepped_once_an_update(configure):
    run = Run(configure("schedule.epochs=4", "schedule.warmup_epochs=2", "schedule.warmup_lr=0", "optimizer.lr=0.6"))
    rates = []
    row = train_one_epoch(run, 0, on_update=lambda meter: rates.append(run.optimizer.param_groups[0]["lr"]))
    # Three updates an epoch: the warm-up is 6 updates long.
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert row["lr"] == pytest.approx(0.2)  # of the third update, after which it is 0.3


def test_validation_counts_every_picture_once(configure):
    run = Run(configure("data.batch_size=5"))
    model = run.bare_model.eval()
    images, labels = zip(*(run.val[position] for position in range(len(run.val))), strict=True)
    with torch.no_grad():
        logits = model(torch.stack(images))
    found = evaluate(run, run.model)
    labels = torch.tensor(labels)
    assert found["val_top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert found["val_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)


def test_autocast_trains_in_bfloat16_and_keeps_float32_weights(configure):
    run = Run(configure("precision=bf16"))
    row = train_one_epoch(run, 0)
    assert row["train_loss"] < 2
    assert run.model(torch.zeros(1, 3, 32, 32)).dtype == torch.float32
    assert {value.dtype for value in run.bare_model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("override", "cuda", "has_bf16", "wanted"),
    [
        ("precision=auto", True, True, "bf16"),
        ("precision=auto", True, False, "no"),
        ("precision=auto", False, True, "no"),
        ("precision=fp32", True, True, "no"),
        ("precision=fp16", True, True, "fp16"),
    ],
)
def test_the_precision_is_bfloat16_where_the_device_has_it(configure, monkeypatch, override, cuda, has_bf16, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert mixed_precision(configure(override, "device=auto")) == wanted
    assert mixed_precision(configure("precision=auto", "device=cpu")) == "no"


def test_a_model_learns_a_few_pictures_by_heart(configure):
    run = train(
        configure("data.limit=9", "data.batch_size=9", "augment.transforms=[{Resize: {}}]", "schedule.epochs=20")
    )
    assert len(run.train) == 9
    assert {run.train.reader.samples[index][1] for index in run.train.indices} == {0, 1, 2}
    assert run.history[-1]["train_top1"] == 100
    assert run.history[-1]["train_loss"] < 0.1 * run.history[0]["train_loss"]


def test_a_batch_of_one_that_a_model_cannot_normalise_names_the_key(configure):
    with pytest.raises(ValueError, match=r"data.batch_size is 1: Expected more than 1 value .*; wanted at least 2"):
        train(replace(configure("data.batch_size=1"), model=ModelConfig("test_resnet")))


def test_a_loss_that_is_no_number_stops_before_it_is_saved(configure):
    with pytest.raises(ValueError, match=r"training loss is (nan|inf) in batch \d of epoch [12]"):
        train(configure("optimizer.lr=1e30"))
    assert not RunFolder(configure().output).last.exists()


# Nothing half-written


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=/no/such/folder", "data.root /no/such/folder is not a folder"),
        ("model.name=test_natt", "unknown model 'test_natt'; the nearest known model is 'test_nat'"),
        ("model.kwargs.windows=3", "model test_nat: .*unexpected keyword argument 'windows'"),
        ("model.kwargs.num_classes=3", "model.kwargs.num_classes follows from the data"),
        ("precision=fp16", "precision=fp16 wants an accelerator and there is only the CPU, wanted bf16 or fp32"),
        ("model.weights=/no/such/file.pth", "model.weights /no/such/file.pth is not a file"),
        ("optimizer.name=adamv", "optimizer adamv"),
        ("optimizer.kwargs.beta=1", "optimizer adamw with {'beta': 1}"),
        ("optimizer.name=adahessian", "optimizer.name is adahessian, wanted one that needs no second derivatives"),
        ("optimizer.name=fusedadamw", "optimizer fusedadamw with {}: .* required"),
        ("optimizer.name=bnbadam8bit", "optimizer bnbadam8bit with {}: .* required"),
        *(
            (f"schedule.name={name}", f"schedule.name is '{name}', wanted cosine, tanh, poly, wsd, rsqrt or constant")
            for name in ("cosinus", "none", "plateau", "multistep", "step")
        ),
        ("schedule.name=rsqrt", "schedule.name=rsqrt with 0 warmup_epochs: "),
        ("model.kwargs.features_only=true", "model.kwargs.features_only is true, wanted a model with a classifier"),
        ("data.batch_size=25", "fewer than data.batch_size"),
        ("data.mean=[0.5,0.5]", r"data.mean is \[0.5, 0.5\], wanted 1 or 3 numbers"),
        ("augment.transforms=[]", r"end at \(3, 40, 40\)|wanted \(3, 48, 48\)"),
    ],
)
def test_what_cannot_be_used_is_an_error_before_anything_is_written(configure, tmp_path, override, message):
    size = ("data.input_size=[3,48,48]",) if "transforms" in override else ()
    with pytest.raises(ValueError, match=message):
        train(configure(override, *size))
    assert not (tmp_path / "run").exists()


def test_training_starts_from_a_published_checkpoint_with_another_classifier(configure, tmp_path):
    torch.manual_seed(1)
    published = timm.create_model("test_nat", layer_scale=1.0)
    torch.save({"model": published.state_dict()}, tmp_path / "published.pth")
    run = Run(configure(f"model.weights={tmp_path / 'published.pth'}"))
    assert run.bare_model.num_classes == 3
    state = run.bare_model.state_dict()
    for name, value in published.state_dict().items():
        assert name.startswith("head.fc") or torch.equal(state[name], value), name


def test_weights_of_another_model_are_an_error_and_not_a_random_start(configure, tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    whole = (tmp_path / "other.pth").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[:1000])
    for name in ("other.pth", "truncated.pth"):
        with pytest.raises(ValueError, match=f"model test_nat with the weights .*{name}"):
            Run(configure(f"model.weights={tmp_path / name}"))


def test_setting_up_writes_nothing(configure, tmp_path):
    config = configure()
    Run(replace(config, baselines=True, examples=3))
    assert not (tmp_path / "run").exists()
