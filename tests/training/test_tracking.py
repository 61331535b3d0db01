from importlib.util import find_spec

import pytest

from visionattn.training import tracking
from visionattn.training.loop import train


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs TensorBoard, of the extra `trackers`")
def test_tensorboard_holds_by_epoch_what_the_summary_holds(configure):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(configure("trackers=null", "report=false"))
    events = EventAccumulator(str(run.folder.path / "visionattn")).Reload()
    for key in ("train_loss", "val_top1", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in run.history]
    assert "optimizer.lr: 0.002" in next((run.folder.path / "visionattn").rglob("hparams.yml")).read_text()


def test_trackers_are_tensorboard_where_it_is_installed_and_otherwise_those_named(monkeypatch):
    for available, chosen in ((["tensorboard", "wandb"], ["tensorboard"]), (["wandb"], []), ([], [])):
        monkeypatch.setattr(tracking, "get_available_trackers", lambda available=available: available)
        assert tracking.choose_trackers(None) == chosen
        assert tracking.choose_trackers([]) == []
        assert tracking.choose_trackers(available) == available


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorbord", "unknown 'tensorbord'; the nearest known is 'tensorboard'"), ("wandb", "wandb is not installed")],
)
def test_a_tracker_that_is_not_there_is_an_error_and_not_left_out(configure, monkeypatch, tmp_path, name, message):
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ValueError, match=message):
        train(configure(f"trackers=[{name}]"))
    assert not (tmp_path / "run").exists()
