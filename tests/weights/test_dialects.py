"""Whoever wrote a checkpoint, it loads whole into the same weights, in every container."""

import re

import pytest
import timm
import torch
from golden import Golden
from safetensors.torch import save_file

from visionattn.weights.nearest import fitting_models

GOLDENS = {"nat_mini": "nat_mini", "dinat_mini": "dinat_mini", "dinat_s_tiny": "dinat_s_tiny", "van_b0": "van_b0"}
GOLDENS |= {"biformer_tiny": "biformer_tiny", "davit_tiny_va": "davit_tiny"}
OUTPUT_NORMS = {"biformer_tiny": "extra_norms.{}", "van_b0": None}


def golden(name: str) -> Golden:
    return Golden.load(f"{__file__}".replace("weights/test_dialects.py", f"golden/{GOLDENS[name]}.npz"))


def transformers_names(authors: dict) -> dict:
    """The authors' NAT as transformers' Nat and Dinat name it, one projection each for query, key and value."""
    renamed = {}
    for name, x in authors.items():
        name = re.sub(r"^patch_embed\.proj\.", "nat.embeddings.patch_embeddings.projection.", name)
        name = re.sub(r"^patch_embed\.", "nat.embeddings.", name)
        name = re.sub(r"^levels\.(\d)\.blocks\.", r"nat.encoder.levels.\1.layers.", name)
        name = re.sub(r"^levels\.", "nat.encoder.levels.", name)
        name = re.sub(r"^norm\.", "nat.layernorm.", re.sub(r"^head\.", "classifier.", name))
        name = name.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        name = name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        name = name.replace(".attn.proj.", ".attention.output.dense.").replace(".attn.rpb", ".attention.self.rpb")
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), x.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.self.{part}.")] = piece.clone()
        else:
            renamed[name] = x
    return renamed


def detector_names(name: str, authors: dict) -> dict:
    """The backbone in a detector, with the norms of its features and without classifier and its norm."""
    kept = {f"backbone.{x}": y for x, y in authors.items() if not re.match(r"(head|norms?)\.", x)}
    norm = OUTPUT_NORMS.get(name, "norm{}")
    if norm:
        kept |= {f"backbone.{norm.format(i)}.weight": torch.ones(64 << i) for i in range(4)}
    return kept | {"rpn_head.conv.weight": torch.ones(2, 2), "neck.0.bias": torch.ones(2)}


def save(path, state_dict: dict, container: str):
    state_dict = {name: x.contiguous() for name, x in state_dict.items()}
    if container == "safetensors":
        save_file(state_dict, path)
    else:
        torch.save({"state_dict": state_dict, "meta": {}}, path, _use_new_zipfile_serialization=container == "zip")
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}


@pytest.mark.parametrize(("name", "container"), [*zip(GOLDENS, ["zip", "legacy", "safetensors"] * 2, strict=True)])
def test_classification_files_of_the_authors_and_our_own_load_strictly(name, container, tmp_path):
    authors = golden(name).state_dict()
    want = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": authors}).state_dict()
    for dialect in (authors, want):
        got = timm.create_model(name, **save(tmp_path / "file", dialect, container)).state_dict()
        assert all(torch.equal(got[key], x) for key, x in want.items())


@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_files_of_transformers_load_strictly(name, tmp_path):
    authors = golden(name).state_dict()
    want = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": authors}).state_dict()
    got = timm.create_model(name, **save(tmp_path / "file", transformers_names(authors), "zip")).state_dict()
    assert all(torch.equal(got[key], x) for key, x in want.items())


def test_layer_scale_of_transformers_is_cut_in_two(tmp_path):
    want = timm.create_model("test_nat").state_dict()
    scales = {key: torch.rand(x.shape) for key, x in want.items() if ".ls" in key}
    module = timm.models.model_entrypoint("test_nat").__module__
    filter_fn = __import__(module, fromlist=["checkpoint_filter_fn"]).checkpoint_filter_fn
    theirs = {}
    for key, x in (want | scales).items():
        key = re.sub(r"^stem\.conv([12])\.", lambda found: f"patch_embed.proj.{int(found[1]) - 1}.", key)
        key = re.sub(r"^stem\.", "patch_embed.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", lambda found: f"levels.{int(found[1]) - 1}.downsample.", key)
        theirs[re.sub(r"^head\.fc\.", "head.", re.sub(r"^stages\.", "levels.", key))] = x
    for key in [key for key in theirs if key.endswith(".ls1.gamma")]:
        block = key.removesuffix(".ls1.gamma")
        pair = torch.stack([theirs.pop(f"{block}.ls1.gamma"), theirs.pop(f"{block}.ls2.gamma")])
        theirs[f"{block}.layer_scale_parameters"] = pair
    got = filter_fn(transformers_names(theirs), timm.create_model("test_nat"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], x) for key, x in (want | scales).items())


@pytest.mark.parametrize("name", GOLDENS)
def test_backbones_of_detectors_give_the_same_features(name, tmp_path):
    authors = golden(name).state_dict()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    arguments = {"pretrained": True, "features_only": True}
    want = timm.create_model(name, pretrained_cfg_overlay={"state_dict": authors}, **arguments).eval()
    file = save(tmp_path / "file", detector_names(name, authors), "zip")
    got = timm.create_model(name, features_only=True, **file).eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(got(x), want(x), strict=True))


def test_the_report_tells_what_became_of_every_name():
    authors = golden("nat_mini").state_dict()
    module = __import__("visionattn.backbones.nat", fromlist=["checkpoint_filter_fn"])
    report = module.checkpoint_filter_fn(detector_names("nat_mini", authors), timm.create_model("nat_mini")).report
    assert report.mapped["levels.0.downsample.norm.weight"] == "stages.1.downsample.norm.weight"
    assert set(report.dropped) > {"rpn_head.conv.weight", "neck.0.bias", "backbone.norm0.weight"}
    assert set(report.missing) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert str(report).startswith(f"{len(report.mapped)} mapped, 0 resized")


def test_a_file_of_another_model_is_told_with_the_model_that_it_fits(tmp_path):
    authors = golden("nat_mini").state_dict()
    assert set(fitting_models(authors)) >= {"nat_mini", "dinat_mini"}
    with pytest.raises(ValueError, match=r"file: checkpoint does not fit NAT.*; it fits dinat_mini, nat_mini"):
        timm.create_model("nat_small", **save(tmp_path / "file", authors, "zip"))


def test_a_file_of_no_model_is_told(tmp_path):
    with pytest.raises(ValueError, match="no model whose published size is near fits"):
        timm.create_model("test_nat", **save(tmp_path / "file", {"foreign": torch.ones(3)}, "zip"))


def test_a_number_that_is_not_finite_is_told(tiny, tmp_path):
    weights = timm.create_model(tiny).state_dict()
    name = next(name for name, x in weights.items() if x.ndim > 1)
    weights[name].view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=f"not finite, first '{name}'"):
        timm.create_model(tiny, **save(tmp_path / "file", weights, "zip"))
