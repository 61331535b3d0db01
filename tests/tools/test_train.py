import csv
from pathlib import Path

import predict
import pytest
import train
from training.generated import TINY, write_pictures

QUICKSTART = Path(__file__).parents[2] / "configs" / "train" / "quickstart.yaml"


@pytest.fixture
def arguments(tmp_path):
    """A configuration of a minute model on generated pictures, as a command line has it."""
    write_pictures(tmp_path / "pictures", per_class=8)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return [
        str(tmp_path / "tiny.yaml"),
        f"data.root={tmp_path / 'pictures'}",
        "data.val_fraction=0.25",
        f"output={tmp_path / 'run'}",
    ]


def test_training_prints_a_line_an_epoch_and_returns_zero(arguments, tmp_path, capsys):
    assert train.main([*arguments, "schedule.epochs=2"]) == 0
    out, err = capsys.readouterr()
    assert "18 to train, 6 to validate, 3 classes" in out
    assert "epoch 2/2  loss" in out
    assert f"saved in {tmp_path / 'run' / 'best'}" in out
    assert err == ""


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("optimizer.lrr=1", "error: unknown key 'optimizer.lrr'; the nearest known key is 'optimizer.lr'"),
        ("data.root=nowhere", "error: data.root nowhere is not a folder"),
        ("resume=true", "error: nothing to resume"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_status_one(arguments, tmp_path, capsys, extra, message):
    assert train.main([*arguments, extra]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_an_unreadable_picture_during_the_training_leaves_no_half_written_file(arguments, tmp_path, capsys):
    (tmp_path / "pictures" / "red" / "3.png").write_bytes(b"")
    unchecked = ("data.check_pictures=false", "data.workers=1", "data.val_fraction=0.125", "data.batch_size=20")
    assert train.main([*arguments, *unchecked]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot read the picture {tmp_path}/pictures/red/3.png")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "environment.json",
        "run.lock",
        "train.log",
    ]


def test_a_path_is_printed_as_it_is(arguments, tmp_path, capsys):
    assert train.main([*arguments, f"output={tmp_path / 'a:100:b [red]'}", "schedule.epochs=1"]) == 0
    assert f"saved in {tmp_path}/a:100:b [red]/best;" in capsys.readouterr().out


def test_an_interrupt_says_how_to_go_on(arguments, capsys, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupt)
    assert train.main(arguments) == 130
    assert "resume=true" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quickstart_reaches_its_accuracy_and_predicts_digits_it_has_not_seen(tmp_path, capsys):
    output = tmp_path / "quickstart"
    assert train.main([str(QUICKSTART), f"output={output}"]) == 0
    out = capsys.readouterr().out
    assert "baseline on the same split: 1-nearest-neighbour" in out
    assert "baseline on the same split: logistic regression" in out
    with (output / "summary.csv").open() as file:
        assert max(float(row["ema_top1"]) for row in csv.DictReader(file)) >= 96

    examples = sorted((output / "examples").glob("*.png"))
    sheet = output / "sheet.png"
    arguments = [*map(str, examples), "--checkpoint", str(output / "best"), "--topk", "1", "--sheet", str(sheet)]
    assert predict.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()[: len(examples)]
    right = sum(line.split(": ")[1][0] == Path(line.split(": ")[0]).name[0] for line in lines)
    assert len(examples) == 20
    # At 96 % each, fewer than 16 right would come up once in a thousand runs.
    assert right >= 16
    assert sheet.is_file()
