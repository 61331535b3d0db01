"""Whoever wrote a checkpoint, it loads whole into the same weights, in every container.

tests/backbones/test_reference_answers.py shows that the authors' names give the authors' answers; here every other
dialect gives the very tensors that those names give.
"""

import math
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import timm
import torch
from files import CONTAINERS, save
from golden import Golden
from timm.models import model_entrypoint
from zoo import OURS, TINY

from visionattn.weights import read_weights
from visionattn.weights.nearest import fitting_models

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
# Where timm owns a name, ours ends in _va.
GOLDENS = {name: path for path in FILES for name in (path.stem, f"{path.stem}_va") if name in OURS}
# How the authors' training scripts wrap what they publish.
WRAPPERS = {"biformer": "model", "van": "state_dict", "davit": "state_dict", "agent": "model", "inline": "model"}
WRAPPERS |= {"mala": "model_ema", "l2vit": "model"}
Weights = dict[str, torch.Tensor]


def filter_of(name: str) -> Callable:
    return sys.modules[model_entrypoint(name).__module__].checkpoint_filter_fn


NUMBERS = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))


def numbers(shape: list[int], start: int) -> torch.Tensor:
    """Numbers that differ from tensor to tensor; to draw them all anew would take most of the tests' time."""
    size = math.prod(shape)
    start %= len(NUMBERS) // 2
    return NUMBERS[start:].repeat(-(-size // (len(NUMBERS) - start)))[:size].view(shape).clone()


@lru_cache(maxsize=1)
def blank(name: str) -> torch.nn.Module:
    """The model without memory for its weights."""
    return timm.create_model(name, device="meta")


@lru_cache(maxsize=1)
def reference(name: str) -> tuple[Weights, Weights]:
    """Weights with the names and shapes of a reference answer, in the authors' names and in ours."""
    manifest = Golden.load(GOLDENS[name]).manifest
    authors = {key: numbers(shape, 1009 * i) for i, (key, shape) in enumerate(manifest)}
    return authors, dict(filter_of(name)(authors, blank(name)))


def renamed(weights: Weights, rules: list[tuple[str, str]]) -> Weights:
    done = {}
    for name, x in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        done[name] = x
    return done


def authors_file(name: str) -> dict:
    """As the authors' training script saves it, with the tables and counters that their modules keep."""
    weights = dict(reference(name)[0])
    for key in list(weights):
        if key.endswith("running_mean"):
            weights[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(7)
        elif key.endswith("relative_position_bias_table"):
            weights[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
            weights[key.replace("attn.relative_position_bias_table", "attn_mask")] = torch.zeros(4, 49, 49)
    if name.startswith("mala"):
        weights |= {f"layers.{i}.RoPE.angle": torch.ones(32) for i in range(4)}
    wrapper = "state_dict_ema" if "cswin" in name else WRAPPERS.get(name.split("_")[0])
    return weights if wrapper is None else {wrapper: weights, "epoch": 299}


def authors_detector(name: str) -> dict:
    """The backbone in a detector, with the norms of its features and without the classifier and its norm."""
    weights = reference(name)[0]
    heads = r"(head|classifier|proj)\.|norms?\.|van_norm"
    kept = {f"backbone.{key}": x for key, x in weights.items() if not re.match(heads, key)}
    norm = {"biformer": "extra_norms.{}", "mala": "extra_norms.{}.norm"}.get(name.split("_")[0], "norm{}")
    if not name.startswith(("van", "agent_pvt", "inline", "halonet", "ulsam")):
        kept |= {f"backbone.{norm.format(i)}.weight": torch.ones(64 << i) for i in range(4)}
    kept |= {"rpn_head.conv.weight": torch.ones(2, 2), "neck.0.bias": torch.ones(2)}
    return {"state_dict": kept, "meta": {"epoch": 12}}


def our_detector(name: str) -> dict:
    """A detector of ours, whose backbone keeps the pruned model as `body`."""
    free = ("head.", "classifier.", "norm.", "conv_head.", "bn2.")
    kept = {f"backbone.body.{key}": x for key, x in reference(name)[1].items() if not key.startswith(free)}
    return {"state_dict": kept | {"backbone.out_norms.0.weight": torch.ones(64)}}


def our_file(name: str) -> Weights:
    return reference(name)[1]


def timm_file(name: str) -> Weights:
    """As timm's model of the same name has it; the order of names is timm's."""
    ours = reference(name)[1]
    names = timm.create_model(name.removesuffix("_va"), device="meta").state_dict()
    return {key: ours.get(key, torch.tensor(7)) for key in names}


def transformers_nat(name: str) -> Weights:
    return transformers_names(reference(name)[0], name.split("_")[0])


def transformers_names(authors: Weights, prefix: str) -> Weights:
    """The names of transformers' Nat and Dinat, one projection each for query, key and value."""
    rules = [
        (r"^patch_embed\.proj\.", f"{prefix}.embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.", f"{prefix}.embeddings."),
        (r"^levels\.(\d)\.blocks\.", rf"{prefix}.encoder.levels.\1.layers."),
        (r"^levels\.", f"{prefix}.encoder.levels."),
        (r"^norm\.", f"{prefix}.layernorm."),
        (r"^head\.", "classifier."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.rpb", ".attention.self.rpb"),
    ]
    done = {}
    for key, x in renamed(authors, rules).items():
        parts = ("query", "key", "value") if ".attn.qkv." in key else ()
        for part, piece in zip(parts, x.chunk(3), strict=False):
            done[key.replace(".attn.qkv.", f".attention.self.{part}.")] = piece.clone()
        if not parts:
            done[key] = x
    return done


def transformers_van(name: str) -> Weights:
    """The names of transformers' Van up to 4.x, misspelt as it is there, with the norm that it never uses."""
    parts = {"patch_embed": "embeddings", "block": "layers", "norm": "normalization"}
    rules = [
        *((rf"^{old}{i + 1}\.", f"van.encoder.stages.{i}.{new}.") for i in range(4) for old, new in parts.items()),
        (r"\.embeddings\.proj\.", ".embeddings.convolution."),
        (r"\.embeddings\.norm\.", ".embeddings.normalization."),
        (r"\.norm1\.", ".pre_normomalization."),
        (r"\.norm2\.", ".post_normalization."),
        (r"\.attn\.proj_1\.", ".attention.pre_projection.conv."),
        (r"\.attn\.proj_2\.", ".attention.post_projection."),
        (r"\.attn\.spatial_gating_unit\.conv0\.", ".attention.attention_layer.attention.depth_wise."),
        (r"\.attn\.spatial_gating_unit\.conv_spatial\.", ".attention.attention_layer.attention.depth_wise_dilated."),
        (r"\.attn\.spatial_gating_unit\.conv1\.", ".attention.attention_layer.attention.point_wise."),
        (r"\.layer_scale_1$", ".attention_scaling.weight"),
        (r"\.layer_scale_2$", ".mlp_scaling.weight"),
        (r"\.mlp\.fc1\.", ".mlp.in_dense."),
        (r"\.mlp\.dwconv\.dwconv\.", ".mlp.depth_wise."),
        (r"\.mlp\.fc2\.", ".mlp.out_dense."),
        (r"^head\.", "classifier."),
    ]
    return renamed(reference(name)[0], rules) | {"van.layernorm.weight": torch.ones(256)}


def mmpretrain_van(name: str) -> dict:
    rules = [
        (r"^(patch_embed\d)\.proj\.", r"\1.projection."),
        (r"^block(\d)\.", r"blocks\1."),
        (r"\.spatial_gating_unit\.conv0\.", ".spatial_gating_unit.DW_conv."),
        (r"\.spatial_gating_unit\.conv_spatial\.", ".spatial_gating_unit.DW_D_conv."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        (r"^(?!head)", "backbone."),
        (r"^head\.", "head.fc."),
    ]
    return {"state_dict": renamed(reference(name)[0], rules)}


def mmpretrain_davit(name: str) -> dict:
    """As in mmpretrain's DaViT, in which the head's norm is that of the backbone's last features."""
    rules = [
        (r"^(patch_embeds\.\d)\.proj\.", r"\1.projection."),
        (r"^patch_embeds\.0\.", "patch_embed."),
        *((rf"^patch_embeds\.{i + 1}\.", f"stages.{i}.downsample.") for i in range(3)),
        (r"^main_blocks\.(\d)\.(\d)\.0\.", r"stages.\1.blocks.\2.spatial_block."),
        (r"^main_blocks\.(\d)\.(\d)\.1\.", r"stages.\1.blocks.\2.channel_block."),
        (r"\.cpe\.0\.", ".cpe1."),
        (r"\.cpe\.1\.", ".cpe2."),
        (r"spatial_block\.attn\.", "spatial_block.attn.w_msa."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
        (r"^norms\.", "norm3."),
        (r"^(?!head)", "backbone."),
        (r"^head\.", "head.fc."),
    ]
    return {"state_dict": renamed(reference(name)[0], rules)}


def dialects(name: str) -> list[Callable]:
    """Builders of the files that exist of a model."""
    found = [authors_file, our_file, authors_detector, our_detector]
    if name.startswith(("nat", "dinat_mini")):
        found.append(transformers_nat)
    if name.startswith("van"):
        found += [transformers_van, mmpretrain_van]
    if name.startswith("davit"):
        found += [timm_file, mmpretrain_davit]
    if name.startswith("halonet"):
        found.append(timm_file)
    return found


MATRIX = [(name, dialect) for name in GOLDENS for dialect in dialects(name)]
# Our own files are every day's below, at the size of the small models.
THEIRS = [pair for pair in MATRIX if pair[1] not in (our_file, our_detector)]


def check(name: str, dialect: Callable, container: str, path: Path) -> None:
    """Fail unless the file gives every tensor of the reference, but for those of the head that a detector lacks."""
    want = reference(name)[1]
    file = dialect(name)
    if container == "safetensors":
        wrapped = next((x for x in file.values() if isinstance(x, dict)), file)
        # These files hold tensors alone, none of them twice.
        file = {key: x.clone() for key, x in wrapped.items()}
    save(path, file, container)
    got = filter_of(name)(read_weights(path), blank(name))
    lacking = {key for key in want if key not in got and not key.endswith("num_batches_tracked")}
    assert lacking == {key for key in got.report.missing if key in want}
    assert not lacking or (dialect in (authors_detector, our_detector) and len(lacking) <= 8), lacking
    for key, x in want.items():
        assert key in lacking or key.endswith("num_batches_tracked") or torch.equal(got[key], x), key


def name_of(argument) -> str:
    return argument if isinstance(argument, str) else argument.__name__


@pytest.mark.parametrize(("name", "dialect"), THEIRS, ids=name_of)
def test_every_dialect_of_every_family_loads_into_the_same_weights(name, dialect, tmp_path):
    container = CONTAINERS[THEIRS.index((name, dialect)) % len(CONTAINERS)]
    check(name, dialect, container, tmp_path / "file")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dialect"), MATRIX, ids=name_of)
def test_every_dialect_of_every_family_loads_from_every_other_container(name, dialect, tmp_path):
    every_day = {CONTAINERS[THEIRS.index((name, dialect)) % len(CONTAINERS)]} if (name, dialect) in THEIRS else set()
    for container in set(CONTAINERS) - every_day:
        check(name, dialect, container, tmp_path / container)


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_family_loads_its_own_files_from_every_container(tiny, container, tmp_path):
    want = timm.create_model(tiny).state_dict()
    save(tmp_path / "file", want, container)
    overlay = {"file": str(tmp_path / "file")}
    got = timm.create_model(tiny, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], x) for key, x in want.items())


def test_every_family_is_in_the_matrix():
    families = {model_entrypoint(name).__module__ for name in TINY}
    # ELA's authors published no code, the isotropic NAT has no reference answer: theirs are our own files alone.
    alone = {"visionattn.backbones.ela", "visionattn.backbones.nat_isotropic"}
    assert {model_entrypoint(name).__module__ for name, _ in MATRIX} == families - alone


def test_tables_of_another_image_size_are_resized_and_reported():
    weights = timm.create_model("test_inline_deit").state_dict()
    model = timm.create_model("test_inline_deit", img_size=128, device="meta")
    got = filter_of("test_inline_deit")(weights, model)
    before, after = (
        tuple(x.state_dict()["stem.token_embed"].shape) for x in (timm.create_model("test_inline_deit"), model)
    )
    assert got.report.resized == {"stem.token_embed": (before, after)}
    assert f"resized stem.token_embed: {before} to {after}" in str(got.report)


def test_layer_scale_of_transformers_is_cut_in_two():
    want = timm.create_model("test_nat").state_dict()
    want |= {key: torch.rand(x.shape) for key, x in want.items() if ".ls" in key}
    rules = [
        *((rf"^stem\.conv{i + 1}\.", f"patch_embed.proj.{i}.") for i in range(2)),
        (r"^stem\.", "patch_embed."),
        *((rf"^stages\.{i + 1}\.downsample\.", f"levels.{i}.downsample.") for i in range(3)),
        (r"^stages\.", "levels."),
        (r"^head\.fc\.", "head."),
    ]
    theirs = transformers_names(renamed(want, rules), "nat")
    first = [key for key in theirs if key.endswith(".ls1.gamma")]
    assert first
    for key in first:
        scales = [theirs.pop(key), theirs.pop(key.replace(".ls1.", ".ls2."))]
        theirs[key.replace("ls1.gamma", "layer_scale_parameters")] = torch.stack(scales)
    got = filter_of("test_nat")(theirs, timm.create_model("test_nat"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], x) for key, x in want.items())


def test_the_report_tells_what_became_of_every_name():
    detector = authors_detector("nat_mini")
    report = filter_of("nat_mini")(detector, blank("nat_mini")).report
    assert report.mapped["levels.0.downsample.norm.weight"] == "stages.1.downsample.norm.weight"
    assert set(report.dropped) > {"rpn_head.conv.weight", "neck.0.bias", "backbone.norm0.weight"}
    assert set(report.missing) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert str(report).startswith(f"{len(report.mapped)} mapped, 0 resized")


def test_the_subspaces_of_the_authors_modules_are_reported_as_one_tensor():
    got = filter_of("ulsam_mobilenetv1")(reference("ulsam_mobilenetv1")[0], blank("ulsam_mobilenetv1"))
    parts = [name for name, target in got.report.mapped.items() if target.startswith("blocks.3.3.conv_dws.weight#")]
    assert parts == [f"blocks.3.3.subspaces.{i}.conv_dws.weight" for i in range(4)]


def test_an_error_gives_the_name_in_the_file_beside_ours():
    authors = dict(reference("nat_mini")[0])
    name = "levels.0.blocks.1.attn.rpb"
    authors[name] = authors[name][..., :-1]
    with pytest.raises(ValueError, match=rf"'stages\.0\.blocks\.1\.attn\.rpb' \('{name}' in the file\): got"):
        filter_of("nat_mini")(authors, blank("nat_mini"))


def test_a_file_of_another_model_is_told_with_the_model_that_it_fits(tmp_path):
    authors = reference("nat_mini")[0]
    assert set(fitting_models(authors)) >= {"nat_mini", "dinat_mini"}
    save(tmp_path / "file", authors, "zip")
    overlay = {"file": str(tmp_path / "file")}
    with pytest.raises(ValueError, match=r"file: checkpoint does not fit NAT.*; it fits dinat_mini, nat_mini"):
        timm.create_model("nat_small", pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_file_of_no_model_is_told(tmp_path):
    save(tmp_path / "file", {"foreign": torch.ones(3)}, "zip")
    with pytest.raises(ValueError, match="no model whose published size is near fits"):
        timm.create_model("test_nat", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "file")})


def test_a_number_that_is_not_finite_is_told(tiny, tmp_path):
    weights = timm.create_model(tiny).state_dict()
    name = next(name for name, x in weights.items() if x.ndim > 1)
    weights[name].view(-1)[0] = torch.nan
    save(tmp_path / "file", weights, "zip")
    with pytest.raises(ValueError, match=f"not finite, first '{name}'"):
        timm.create_model(tiny, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "file")})
