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


def test_recomputed_blocks_give_the_same_gradients():
    x = torch.randn(1, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        backbone = build("test_nat", with_cp=with_cp)
        sum(feature.square().mean() for feature in backbone(x)).backward()
        grads.append([parameter.grad for parameter in backbone.parameters()])
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-7) for pair in zip(*grads, strict=True))


def test_layers_learn_slower_the_deeper_they_lie_and_biases_do_not_decay():
    from mmengine.optim import build_optim_wrapper

    model = nn.Module()
    model.backbone, model.head = build("test_nat", out_norm=1e-5), nn.Linear(4, 4)
    wrapper = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.5}}
    settings = {"constructor": "VisionAttnOptimizer", "paramwise_cfg": {"layer_decay": 0.5}}
    groups = build_optim_wrapper(model, wrapper | settings).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(group["params"][0])]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found.keys() == set(names.values())
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


def test_the_training_log_of_mmengine_is_read_without_trusting_the_file(tmp_path):
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"state_dict": {}, "message_hub": {"loss": history}}, tmp_path / "log.pth")
    read = visionattn.openmmlab.read_checkpoint(tmp_path / "log.pth")
    assert read["message_hub"]["loss"].mean() == 1.5
