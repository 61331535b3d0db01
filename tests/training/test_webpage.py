import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from training.generated import TINY

from visionattn.training.config import load_config
from visionattn.training.loop import train
from visionattn.training.webpage import Verdicts, _confusion, judge


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A run so short that some pictures are still wrong."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "tiny.yaml").write_text(TINY)
    given = (f"data.root={pictures}", f"output={folder / 'run'}", "schedule.epochs=1", "optimizer.lr=1e-6")
    return train(load_config(folder / "tiny.yaml", given))


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_refers_to_nothing_outside_itself_and_holds_everything(trained):
    text = (trained.folder.path / "report.html").read_text()
    page = Page(text)
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "@import" not in text
    assert "url(" not in text
    for part in ("Curves", "Confusion", "Most wrong", "Epochs", "name: test_nat", "images/s in training"):
        assert part in page.text
    assert f"{max(row['val_top1'] for row in trained.history):.2f} % of 12 validation pictures right" in page.text
    wrong = round(12 * (1 - trained.history[0]["val_top1"] / 100))
    assert wrong > 0
    assert text.count("<figure>") == wrong


def test_the_verdicts_are_those_of_the_evaluation(trained):
    verdicts = judge(trained.bare_model, trained.val, trained.config.data)
    assert 100 * (verdicts.labels == verdicts.predicted).mean() == pytest.approx(trained.history[0]["val_top1"])
    assert verdicts.losses.mean() == pytest.approx(trained.history[0]["val_loss"], rel=1e-5)
    assert verdicts.confusion(3).sum(1).tolist() == [4, 4, 4]


def test_the_worst_pictures_are_wrong_and_in_the_order_of_their_loss():
    labels, predicted = np.array([0, 1, 2, 1]), np.array([0, 2, 0, 2])
    verdicts = Verdicts(labels, predicted, np.array([9.0, 1.0, 3.0, 2.0]), np.ones(4))
    assert verdicts.worst(2) == [2, 3]
    assert verdicts.confusion(3).tolist() == [[1, 0, 0], [0, 0, 2], [1, 0, 0]]


def test_with_many_classes_the_page_lists_the_most_frequent_confusions():
    cells = 10 * np.eye(50, dtype=int)
    cells[7, 8] = 3
    cells[1, 2] = 5
    found = re.findall(
        r"<tr><td>(\w+)</td><td>(\w+)</td><td>(\d+)</td></tr>", _confusion(cells, [f"c{i}" for i in range(50)])
    )
    assert found == [("c1", "c2", "5"), ("c7", "c8", "3")]


@pytest.mark.browser
def test_a_browser_shows_the_page_without_a_network(trained, tmp_path):
    chromium = shutil.which("chromium")
    assert chromium, "the marker browser wants Debian's chromium"
    page = trained.folder.path / "report.html"
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
    offline = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    options = (*quiet, *offline, f"--user-data-dir={tmp_path / 'profile'}")
    script = (
        "<script>addEventListener('load', () => { const pictures = [...document.images]; document.title = "
        "`${pictures.length} pictures, ${pictures.filter(x => x.naturalWidth > 0).length} shown, "
        "${document.documentElement.scrollWidth <= innerWidth} fits`; })</script>"
    )
    scripted = tmp_path / "scripted.html"
    scripted.write_text(page.read_text().replace("</head>", f"{script}</head>"))
    done = subprocess.run(
        [chromium, *options, "--window-size=1200,900", "--dump-dom", scripted.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    count = page.read_text().count("<img")
    assert f"<title>{count} pictures, {count} shown, true fits</title>" in done.stdout
