"""Every entry says where its weights lie, and nothing pretends to be downloadable."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from timm.models import generate_default_cfgs
from timm.models._registry import _model_default_cfgs
from zoo import OURS

from visionattn.registry import cfg, published
from visionattn.weights import fetch, source_of

ENTRIES = {
    f"{name}.{tag}": timm.get_pretrained_cfg(f"{name}.{tag}") for name in OURS for tag in _model_default_cfgs[name].cfgs
}
PAPER = {"paper": "2204.07143", "source": "https://example.org", "license": "mit"}


def entry(**fields):
    """An entry as the registry returns it."""
    return generate_default_cfgs({"net.tag": cfg(**PAPER, **fields)})["net"].default.__class__(
        **cfg(**PAPER, **fields).to_dict(remove_null=False) | {"architecture": "net", "tag": "tag"}
    )


def test_every_file_has_a_place_of_its_own_in_the_cache():
    names = [source_of(entry).cache for entry in ENTRIES.values()]
    kept = [name for name in names if name]
    assert kept
    assert len(kept) == len(set(kept))


def test_every_source_that_is_not_direct_counts_as_having_no_weights():
    for name, given in ENTRIES.items():
        assert bool(given.has_weights) == (source_of(given).state == "direct"), name


@pytest.mark.parametrize(("dead", "why"), [(False, "a person must fetch"), (True, "no longer answers")])
def test_a_page_is_an_error_that_names_it_and_the_command(dead, why):
    page = "https://cloud.example.org/f/1/?dl=1"
    with pytest.raises(ValueError, match=rf"{why}|{page}") as raised:
        fetch(entry(page=page, dead=dead, top1=80.0))
    message = str(raised.value)
    assert why in message
    assert page in message
    assert "timm.create_model('net', pretrained=True, pretrained_cfg_overlay={'file': FILE})" in message
    assert published(entry(page=page, top1=80.0)) == {"top1": 80.0}


def test_two_sources_are_refused():
    with pytest.raises(ValueError, match="one source"):
        cfg(**PAPER, url="https://example.org/a.pth", page="https://example.org")


@pytest.mark.parametrize(
    ("files", "chosen"), [(["README.md", "MAViT_T.pth", "MAViT_S.pth"], "MAViT_T.pth"), (["a"], "")]
)
def test_the_one_file_that_a_pattern_fits_is_fetched_from_the_hub(files, chosen, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr("visionattn.weights.sources.hf_hub_download", lambda _, name, **__: tmp_path / name)
    pattern = timm.get_pretrained_cfg("mala_tiny")
    if chosen:
        assert fetch(pattern) == tmp_path / chosen
    else:
        with pytest.raises(
            ValueError, match=r"aldjalkdf/MAViT must have one file like .* of \['a'\]; a file that you have"
        ):
            fetch(pattern)


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("nat_mini", "in1k"),
        ("dinat_base", "in1k"),
        ("dinat_large_384_11x11", "in22k_ft_in1k"),
        ("davit_tiny_va", "in1k"),
        ("van_b0", ""),
        ("van_b4", "in1k"),
        ("mala_tiny", ""),
        ("l2vit_tiny", ""),
        ("halonet26t_va", ""),
    ],
)
def test_a_durable_copy_is_the_default_and_the_authors_own_file_a_second_tag(name, second):
    default = source_of(timm.get_pretrained_cfg(name))
    assert default.state == "direct"
    assert default.address.startswith(
        ("https://huggingface.co/", "https://github.com/", "https://download.openmmlab.com/")
    )
    if second:
        assert source_of(timm.get_pretrained_cfg(f"{name}.{second}")).address != default.address


def test_the_small_models_for_tests_have_no_weights():
    tiny = {name: given for name, given in ENTRIES.items() if name.startswith("test_")}
    assert {source_of(given).state for given in tiny.values()} == {"none"}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_direct_file_is_downloaded_once_and_loads(tmp_path):
    model = timm.create_model("test_nat")
    (tmp_path / "served").mkdir()
    torch.save({"model": model.state_dict()}, tmp_path / "served" / "weights.pth")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        overlay = {"url": f"http://127.0.0.1:{server.server_port}/weights.pth?dl=1"}
        arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay, "cache_dir": tmp_path / "cache"}
        loaded = timm.create_model("test_nat", **arguments)
        server.shutdown()
    again = timm.create_model("test_nat", **arguments)
    for x in (loaded, again):
        assert all(torch.equal(a, b) for a, b in zip(x.state_dict().values(), model.state_dict().values(), strict=True))
        assert "state_dict" not in x.pretrained_cfg
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["test_nat.untrained.pth"]
