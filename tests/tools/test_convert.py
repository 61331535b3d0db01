"""tools/convert.py turns the authors' file into ours and proves it."""

import convert
import timm
import torch
from golden import Golden
from safetensors.torch import load_file

GOLDEN = __file__.replace("tools/test_convert.py", "golden/van_b0.npz")


def run(model: str, source, out, *more) -> int:
    return convert.main(["--model", model, "--in", str(source), "--out", str(out), *more])


def test_the_authors_file_becomes_ours(tmp_path, capsys):
    authors = Golden.load(GOLDEN).state_dict()
    torch.save({"state_dict": authors}, tmp_path / "theirs.pth.tar")
    assert run("van_b0", tmp_path / "theirs.pth.tar", tmp_path / "ours.safetensors", "--verify") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{len(authors)} mapped, 0 resized, 0 dropped")
    assert "verified" in printed
    want = timm.create_model("van_b0", pretrained=True, pretrained_cfg_overlay={"state_dict": authors}).state_dict()
    got = load_file(tmp_path / "ours.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_what_cannot_be_converted_is_told_and_nothing_is_written(tmp_path, capsys):
    torch.save({"foreign": torch.ones(2)}, tmp_path / "file")
    assert run("test_nat", tmp_path / "file", tmp_path / "out") == 1
    assert "checkpoint does not fit NAT" in capsys.readouterr().err
    assert run("nat_mimi", tmp_path / "file", tmp_path / "out") == 1
    assert "'nat_mini'" in capsys.readouterr().err
    for name, message in (
        ("test_nat.foo", "model test_nat.foo: Invalid pretrained tag (foo)"),
        ("test_resnet", "test_resnet is a model of timm itself, wanted one of visionattn"),
    ):
        assert run(name, tmp_path / "file", tmp_path / "out") == 1
        err = capsys.readouterr().err
        assert err.startswith(f"error: {message}")
        assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_told_and_nothing_is_left_there(tmp_path, capsys):
    torch.save({"state_dict": timm.create_model("test_nat").state_dict()}, tmp_path / "file")
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "missing" / "out", tmp_path / "folder", tmp_path / "file" / "out", tmp_path / ("x" * 255)):
        assert run("test_nat", tmp_path / "file", out) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"error: cannot write {out}: ")
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
