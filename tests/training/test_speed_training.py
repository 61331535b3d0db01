"""What the loop and the loader cost; the figures themselves need an idle machine."""

import re
from html import escape
from pathlib import Path

import pytest
import torch
from benchmark import main
from training.generated import TINY

from visionattn.training.loop import train
from visionattn.training.speed import time_training

QUICKSTART = Path(__file__).parents[2] / "configs" / "train" / "quickstart.yaml"


# timm's data set leaves the files of pictures for the collector to close.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_epoch_and_the_loader_are_timed_beside_a_bare_loop_and_timms_loader(
    configure, monkeypatch, tmp_path, capsys
):
    config = configure("data.batch_size=4", "augment.mixup=0.8")
    found = time_training(config, rounds=1)
    assert (found.images, found.loaded) == (24, 12)
    # The loop contains what the bare one does, and no machine makes nine of ten parts of it vanish.
    assert found.overhead > -0.9
    assert found.loader_ratio > 0.05
    (tmp_path / "tiny.yaml").write_text(TINY)
    given = [str(tmp_path / "tiny.yaml"), f"data.root={config.data.root}", f"output={tmp_path / 'run'}"]
    assert main(["training", *given, "--rounds", "1", "--threads", str(torch.get_num_threads())]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"epoch of 24 pictures: [\d.]+ s, bare loop [\d.]+ s: -?[\d.]+ % overhead\n", printed)
    assert re.search(r"loader, 12 pictures: \d+ a second, timm's \d+ a second: \d+ %", printed)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_report_shows_what_was_timed_and_the_run_stays_as_it_was(configure):
    run = train(configure("time_loop=17", "data.batch_size=8", "checkpoint_every=1"))
    said = (run.folder.path / "train.log").read_text().splitlines()[-4:-1]
    assert said[0].startswith("epoch of 16 pictures: ")
    assert said[1].startswith("loader, 12 pictures: ")
    assert said[2].startswith("medians of 7")
    page = (run.folder.path / "report.html").read_text()
    assert f"<h2>Loop and loader</h2><p>{'<br>'.join(map(escape, said))}</p>" in page
    saved = run.folder.load_last()
    assert (saved["updates"], len(saved["history"]), saved["within"]) == (6, 2, None)


def test_several_processes_and_shards_are_not_timed(configure):
    with pytest.raises(ValueError, match="time_loop wants one process, and data that is not read shard by shard"):
        train(configure("time_loop=16", "data.reader=wds"))


@pytest.mark.speed
def test_the_loop_adds_a_tenth_to_a_bare_one_and_the_loader_keeps_up_with_timms(tmp_path):
    from visionattn.training.config import load_config

    config = load_config(QUICKSTART, ["time_loop=1536", f"output={tmp_path / 'run'}"])
    found = time_training(config)
    assert found.overhead <= 0.10
    assert found.loader_ratio >= 0.80
