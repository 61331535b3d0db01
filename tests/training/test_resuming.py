"""Going on with a run from what its folder holds, and what a folder refuses."""

import json
import os
import shutil
import signal
import time
from contextlib import suppress

import numpy as np
import pytest
import timm
import torch
from training.generated import write_pictures

from visionattn.training.folder import RunFolder
from visionattn.training.loop import train
from visionattn.training.run import Run

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
