"""One class brings any model of the zoo into mmdet and mmseg, with weights from anywhere."""

from pathlib import Path

import pytest
import timm
import torch
from golden import Golden, difference, fill, image
from mmengine.registry import MODELS
from torch import nn

import visionattn.openmmlab

GOLDEN = Path(__file__).parents[1] / "golden"


def build(model: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build({"type": "VisionAttn", "model": model, **kwargs})


@pytest.mark.parametrize("size", [(65, 97), (64, 96)], ids=str)
def test_maps_are_contiguous_and_have_the_declared_channels(tiny, size):
    backbone = build(tiny, out_norm=1e-5).eval()
    maps = backbone(torch.randn(1, 3, *size))
    assert all(x.is_contiguous() for x in maps)
    assert [x.shape[1] for x in maps] == backbone.out_channels
    assert backbone.out_channels == timm.create_model(tiny, features_only=True).feature_info.channels()


def test_every_registry_of_openmmlab_finds_the_backbone():
    import mmdet.registry
    import mmseg.registry

    for registry in (mmdet.registry.MODELS, mmseg.registry.MODELS):
        assert registry.get("VisionAttn") is visionattn.openmmlab.VisionAttn


@pytest.mark.parametrize("prefix", ["", "backbone."], ids=["alone", "in a segmenter"])
@pytest.mark.parametrize(
    ("file", "kwargs"),
    [("van_b0.dense.256x320", {"norm_eps": 1e-5}), ("mala_tiny.dense.192x256", {"out_norm": 1e-6})],
    ids=["van_b0", "mala_tiny"],
)
def test_outputs_are_those_of_the_authors_dense_backbones(file, kwargs, prefix, tmp_path):
    golden = Golden.load(GOLDEN / f"{file}.npz")
    torch.save({"state_dict": {prefix + name: x for name, x in golden.state_dict().items()}}, tmp_path / "dense.pth")
    backbone = build(file.split(".")[0], pretrained=str(tmp_path / "dense.pth"), **kwargs).eval()
    with torch.no_grad():
        maps = backbone(torch.from_numpy(image(*golden.input_shape)))
    for i, x in enumerate(maps):
        assert list(x.shape) == golden.meta["shapes"][f"feature_{i}"]
        assert difference(x.numpy(), golden.outputs[f"feature_{i}"]) <= 1e-5


@pytest.mark.parametrize(("model", "eps"), [("nat_mini", 1e-5), ("dinat_s_tiny", 1e-5), ("biformer_tiny", 1e-6)])
def test_norms_of_the_authors_detectors_load_by_their_names(model, eps, tmp_path):
    golden = Golden.load(GOLDEN / f"{model}.npz")
    # A detector has neither the classifier nor its norm.
    weights = {name: x for name, x in golden.state_dict().items() if not name.startswith(("head.", "norm."))}
    norms = {name: torch.from_numpy(fill(name, tuple(shape))) for name, shape in golden.meta["feature_manifest"]}
    assert norms
    path = tmp_path / "detector.pth"
    torch.save({"state_dict": {f"backbone.{name}": x for name, x in (weights | norms).items()}}, path)
    backbone = build(
        model, out_norm=eps, init_cfg={"type": "Pretrained", "checkpoint": str(path), "prefix": "backbone"}
    )
    backbone.init_weights()
    with torch.no_grad():
        maps = backbone.eval()(torch.from_numpy(image(*golden.input_shape)))
    for i, x in enumerate(maps):
        assert difference(x.numpy(), golden.outputs[f"feature_{i}"]) <= 1e-5


def test_our_own_weights_come_back_from_a_detector(tmp_path):
    saved = build("test_nat", out_norm=1e-5)
    torch.save({"state_dict": {f"backbone.{name}": x for name, x in saved.state_dict().items()}}, tmp_path / "own.pth")
    torch.manual_seed(1)
    loaded = MODELS.build(
        {"type": "VisionAttn", "model": "test_nat", "out_norm": 1e-5, "pretrained": str(tmp_path / "own.pth")}
    )
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in saved.state_dict().items())


def in_a_detector(backbone: nn.Module, path: Path, **changes: torch.Tensor) -> str:
    """The file of a detector of ours, which has all of `backbone`, with `changes` to it."""
    torch.save({"state_dict": {f"backbone.{name}": x for name, x in (backbone.state_dict() | changes).items()}}, path)
    return str(path)


def test_our_own_weights_of_another_backbone_are_refused(tmp_path):
    file = in_a_detector(build("test_nat"), tmp_path / "deep.pth")
    with pytest.raises(ValueError, match=r"deep\.pth.*does not fit NAT: .* unknown, first 'stages\.2\.blocks\.1"):
        build("test_nat", depths=(1, 2, 1, 1), pretrained=file)
    file = in_a_detector(build("test_nat"), tmp_path / "more.pth", extra=torch.ones(1))
    with pytest.raises(ValueError, match="unknown, first 'extra'"):
        build("test_nat", pretrained=file)


@pytest.mark.parametrize("name", ["body.stem.conv1.weight", "out_norms.0.bias"])
def test_our_own_weights_must_be_finite(name, tmp_path):
    backbone = build("test_nat", out_norm=1e-5)
    broken = torch.full_like(backbone.state_dict()[name], torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        build("test_nat", out_norm=1e-5, pretrained=in_a_detector(backbone, tmp_path / "nan.pth", **{name: broken}))


@pytest.mark.parametrize(
    "kwargs", [{"out_indices": (0, 2)}, {"out_norm": 1e-5}, {"out_indices": (1,), "out_norm": 1.0}]
)
def test_our_own_weights_load_where_less_or_without_norms_is_kept(kwargs, tmp_path):
    saved = build("test_nat", out_norm=1e-6)
    loaded = build("test_nat", pretrained=in_a_detector(saved, tmp_path / "own.pth"), **kwargs)
    assert all(torch.equal(x, saved.state_dict()[name]) for name, x in loaded.state_dict().items())
    fewer = build("test_nat", out_indices=(0, 1), pretrained=in_a_detector(saved, tmp_path / "own.pth"))
    with pytest.raises(ValueError, match="names are missing, first 'stages"):
        build("test_nat", pretrained=in_a_detector(fewer, tmp_path / "fewer.pth"))


def test_a_file_is_a_path_too_and_anything_else_is_told(tmp_path):
    saved = build("test_nat")
    in_a_detector(saved, tmp_path / "own.pth")
    loaded = MODELS.build({"type": "VisionAttn", "model": "test_nat", "pretrained": tmp_path / "own.pth"})
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in saved.state_dict().items())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build("test_nat", pretrained=tmp_path / "nowhere.pth")
    with pytest.raises(TypeError, match=r"pretrained must be True, False or a file, got \['own.pth'\]"):
        build("test_nat", pretrained=["own.pth"])


@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(1), {}, {"state_dict": {}}], ids=repr)
def test_a_file_without_named_tensors_is_told_by_its_name(content, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth: must hold named tensors"):
        build("test_nat", pretrained=str(tmp_path / "odd.pth"))


def test_bad_safetensors_are_told_by_their_name(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors: not read"):
        build("test_nat", pretrained=str(tmp_path / "bad.safetensors"))


def test_frozen_stages_and_frozen_batch_norms_stay_as_they_are():
    backbone = build("test_van", frozen_stages=1, norm_eval=True).train()
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    sum(x.square().mean() for x in backbone(torch.randn(2, 3, 64, 64))).backward()
    trained = {name for name, x in backbone.named_parameters() if x.grad is not None}
    assert trained
    assert not any(name.startswith(("body.stem.", "body.stages.0.")) for name in trained)
    assert {name.split(".")[2] for name in trained} == {"1", "2", "3"}
    assert all(torch.equal(x, before[name]) for name, x in backbone.named_buffers())


def test_initialisation_by_mmengine_keeps_the_weights():
    backbone = build("test_nat")
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    backbone.init_weights()
    assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())


@pytest.mark.parametrize("in_list", [False, True], ids=["a step", "a list of steps"])
def test_initialisation_by_mmengine_changes_the_layers_that_it_names_alone(in_list, tmp_path):
    file = in_a_detector(build("test_nat"), tmp_path / "own.pth")
    step = {"type": "Constant", "layer": "Conv2d", "val": 0.5}
    backbone = build("test_nat", pretrained=file, init_cfg=[step] if in_list else step)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    backbone.init_weights()
    convolutions = {f"{name}.{kind}" for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)
                    for kind in ("weight", "bias")}  # fmt: skip
    for name, x in backbone.state_dict().items():
        wanted = before[name] if name not in convolutions else torch.full_like(x, 0.5 * name.endswith("weight"))
        assert torch.equal(x, wanted), name


def test_a_checkpoint_counts_more_than_the_other_steps_of_an_initialisation(tmp_path):
    saved = build("test_nat")
    file = in_a_detector(saved, tmp_path / "own.pth")
    steps = [{"type": "Pretrained", "checkpoint": file}, {"type": "Constant", "layer": "Conv2d", "val": 0.5}]
    backbone = build("test_nat", init_cfg=steps)
    backbone.init_weights()
    assert all(torch.equal(x, backbone.state_dict()[name]) for name, x in saved.state_dict().items())


@pytest.mark.parametrize(
    "init_cfg",
    ["own.pth", {"layer": "Conv2d"}, ["own.pth"], {"type": "Pretrained"}, {"type": "Pretrained", "checkpoint": None}],
    ids=repr,
)
def test_an_initialisation_that_says_nothing_is_told(init_cfg):
    with pytest.raises(ValueError, match="init_cfg"):
        build("test_nat", init_cfg=init_cfg).init_weights()


def test_frozen_batch_norms_stay_so_when_synchronised_and_back():
    from mmengine.model import revert_sync_batchnorm

    backbone = build("test_van", frozen_stages=1)
    names = {name for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, revert_sync_batchnorm):
        backbone = convert(backbone).train()
        modules = {name: module for name, module in backbone.named_modules() if name in names}
        frozen = {name for name, module in modules.items() if not module.training}
        assert frozen == {name for name in names if name.startswith(("body.stem.", "body.stages.0."))}
        assert not any(x.requires_grad for name in frozen for x in modules[name].parameters())


def test_a_backbone_comes_back_whole_from_a_pickle(tmp_path):
    backbone = build("test_nat", out_norm=1e-5, frozen_stages=0).eval()
    torch.save(backbone, tmp_path / "whole.pth")
    loaded = torch.load(tmp_path / "whole.pth", weights_only=False)
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(*pair) for pair in zip(backbone(x), loaded(x), strict=True))
    # The names of authors are still translated.
    loaded.load_state_dict(timm.create_model("test_nat").state_dict(), strict=False)


def test_recomputed_blocks_give_the_same_gradients():
    x = torch.randn(1, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        backbone = build("test_nat", with_cp=with_cp)
        sum(feature.square().mean() for feature in backbone(x)).backward()
        grads.append([parameter.grad for parameter in backbone.parameters()])
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-7) for pair in zip(*grads, strict=True))


def settings_by_name(paramwise: dict, optimizer: dict | None = None) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter of a model with a backbone and a head."""
    from mmengine.optim import build_optim_wrapper

    model = nn.Module()
    model.backbone, model.head = build("test_nat", out_norm=1e-5), nn.Linear(4, 4)
    optimizer = optimizer or {"type": "AdamW", "lr": 1.0, "weight_decay": 0.5}
    wrapper = {"type": "OptimWrapper", "optimizer": optimizer, "constructor": "VisionAttnOptimizer"}
    groups = build_optim_wrapper(model, wrapper | {"paramwise_cfg": paramwise}).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(group["params"][0])]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found.keys() == set(names.values())
    return found


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_custom_keys_count_in_the_backbone_too(layer_decay):
    without = settings_by_name({"layer_decay": layer_decay})
    keys = {"backbone": {"lr_mult": 0.1}, "stages.0.blocks": {"lr_mult": 0.0}, "rpb": {"decay_mult": 2.0}}
    found = settings_by_name({"layer_decay": layer_decay, "custom_keys": keys})
    for name, (rate, decay) in without.items():
        # The longest key alone counts, as in mmengine.
        if "backbone" in name:
            rate *= 0.0 if "stages.0.blocks" in name else 0.1
        assert found[name] == pytest.approx((rate, decay)), name
    found = settings_by_name({"layer_decay": layer_decay, "custom_keys": {"rpb": {"decay_mult": 2.0}}})
    tables = [name for name in found if "rpb" in name]
    assert tables
    assert all(found[name] == (without[name][0], 1.0) for name in tables)


def test_an_optimiser_without_weight_decay_is_taken():
    found = settings_by_name({"layer_decay": 0.5}, {"type": "Adam", "lr": 1.0})
    assert found["backbone.body.stages.3.blocks.0.mlp.fc1.weight"] == (0.5, 0)


def test_layers_learn_slower_the_deeper_they_lie_and_biases_do_not_decay():
    found = settings_by_name({"layer_decay": 0.5})
    assert found["head.weight"] == (1.0, 0.5)
    body = "backbone.body"
    rates = [found[f"{body}.{name}.weight"][0] for name in ("stem.conv1", "stages.0.blocks.0.mlp.fc1")]
    rates += [found[f"{body}.stages.{i}.blocks.0.mlp.fc1.weight"][0] for i in (1, 2, 3)]
    assert rates == sorted(set(rates))
    # Stem, six blocks and the outputs' norms are layers of their own.
    assert found["backbone.out_norms.0.weight"] == (1.0, 0.0)
    assert found[f"{body}.stages.3.blocks.0.mlp.fc1.weight"] == (0.5, 0.5)
    assert all(decay == 0 for name, (_, decay) in found.items() if name.startswith(body) and "rpb" in name)
    assert all(decay == 0 for name, (_, decay) in found.items() if name.startswith(body) and name.endswith("bias"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": "nat_minni"}, "nearest are .*nat_mini"),
        ({"model": "test_nat", "out_indices": (0, 4)}, "0 to 3 for test_nat"),
        ({"model": "test_nat", "out_indices": 3}, "out_indices must rise within 0 to 3 for test_nat, got 3"),
        ({"model": "test_nat", "out_indices": None}, "out_indices .* got None"),
        ({"model": "test_nat", "out_indices": (1.0,)}, "out_indices .* got .1.0"),
        ({"model": "test_nat", "frozen_stages": None}, "frozen_stages must be from -1 to 4 for test_nat, got None"),
        ({"model": "test_nat", "frozen_stages": 1.5}, "frozen_stages .* got 1.5"),
        ({"model": "test_nat", "frozen_stages": 5}, "from -1 to 4"),
    ],
)
def test_bad_arguments_are_told(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_a_checkpoint_of_another_architecture_is_refused_by_its_name(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(timm.create_model("test_van").state_dict(), path)
    with pytest.raises(ValueError, match=r"other\.pth.*does not fit NAT"):
        build("test_nat", pretrained=str(path))


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_checkpoint_with_code_is_not_run(tmp_path, capsys):
    torch.save({"state_dict": {}, "meta": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        visionattn.openmmlab.read_checkpoint(tmp_path / "bad.pth")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "named",
    ["OneCycleParamScheduler", "OneCycleParamScheduler.__init__", "HistoryBuffer.__init__", "ConfigDict.__init__"],
)
def test_a_checkpoint_takes_no_more_of_a_class_than_it_needs(named, tmp_path):
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

    name, _, attribute = named.partition(".")
    owner = {x.__name__: x for x in (ConfigDict, HistoryBuffer, OneCycleParamScheduler)}[name]

    class Calls:
        def __reduce__(self):
            return (getattr, (owner, attribute)) if attribute else (owner, (1, 2))

    torch.save({"state_dict": {}, "meta": Calls()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        visionattn.openmmlab.read_checkpoint(tmp_path / "bad.pth")


def test_the_training_log_of_mmengine_is_read_without_trusting_the_file(tmp_path):
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"state_dict": {}, "message_hub": {"loss": history}}, tmp_path / "log.pth")
    read = visionattn.openmmlab.read_checkpoint(tmp_path / "log.pth")
    assert read["message_hub"]["loss"].mean() == 1.5
