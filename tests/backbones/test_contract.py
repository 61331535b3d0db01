"""Whatever works on a timm model works on ours: sizes, features, compile, export, precision, fine-tuning, saving."""

import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from zoo import OURS, PUBLISHED

from visionattn.registry import published

EPS = torch.finfo(torch.float32).eps
# A handful of float32 roundings in another order, on logits of magnitude one.
CLOSE = {"rtol": 64 * EPS, "atol": 64 * EPS}
# Their patches leave out pixels that do not fill one, where all others pad.
LEAVE_OUT = ("test_agent_pvt", "test_inline_pvt", "test_biformer_stl")
# Tables that their authors train without weight decay: relative biases, and what DeiT adds to its tokens.
UNDECAYED = (".rpb", ".relative_position_bias_table", "stem.cls_token", "stem.token_embed")
SIZES = [(33, 257), (37, 64), (64, 33), (97, 127), (127, 37), (193, 97), (257, 193)]


def create(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def images(height: int = 96, width: int = 96, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def input_size(name: str) -> int:
    return timm.get_pretrained_cfg(name).input_size[-1]


def test_registered_names_are_the_agreed_ones():
    agreed = (Path(__file__).parent / "model_names.txt").read_text().split()
    assert set(PUBLISHED) <= set(agreed)
    started = {re.sub(r"_.*", "", name) for name in PUBLISHED}
    missing = [name for name in agreed if re.sub(r"_.*", "", name) in started and name not in PUBLISHED]
    assert not missing


def test_no_module_of_ours_has_the_name_of_one_of_timm():
    ours = {path.stem for path in (Path(timm.__file__).parent / "models").glob("*.py")}
    assert not ours & {path.stem for path in Path(__file__).parents[2].glob("visionattn/backbones/[!_]*.py")}


def test_parameters_are_as_many_as_published(variant):
    entry = timm.get_pretrained_cfg(variant)
    assert entry.paper_ids
    assert entry.license
    assert entry.origin_url
    with torch.device("meta"):
        model = timm.create_model(variant)
    count = sum(x.numel() for x in model.parameters())
    assert published(entry).get("params", count) == count
    assert entry.num_classes == 1000


def test_every_source_of_weights_is_distinct():
    urls = [entry.url for name in OURS for entry in timm.models._registry._model_default_cfgs[name].cfgs.values()]
    named = [url for url in urls if url]
    assert len(named) == len(set(named))


def test_tiny_models_are_tiny_and_have_no_weights(tiny):
    model = create(tiny)
    assert sum(x.numel() for x in model.parameters()) < 1e6
    # timm's MobileNets call the list of their stages `blocks`.
    stages = model.blocks if hasattr(model, "blocks") else [getattr(stage, "blocks", stage) for stage in model.stages]
    assert all(len(blocks) <= 2 for blocks in stages)
    assert not model.pretrained_cfg.get("url")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_any_size_runs_forward_and_backward(tiny, size):
    model = create(tiny).train()
    logits = model(images(*size))
    logits.square().mean().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(x.grad).all() for x in model.parameters())


def test_any_size_that_hypothesis_finds_gives_features_of_the_declared_reduction(tiny):
    model = create(tiny)

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(st.integers(16, 150), st.integers(16, 150))
    def run(height, width):
        with torch.no_grad():
            features = model.forward_intermediates(images(height, width, 1), intermediates_only=True)
        for info, feature in zip(model.feature_info, features, strict=True):
            size = [-(-side // info["reduction"]) for side in (height, width)]
            if tiny in LEAVE_OUT:
                size = [max(1, side // info["reduction"]) for side in (height, width)]
            assert list(feature.shape) == [1, info["num_chs"], *size]

    run()


@pytest.mark.parametrize("size", [(0, 64), (64, 0)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_an_empty_image_is_refused(tiny, size):
    with pytest.raises((RuntimeError, ValueError)):
        create(tiny)(images(*size))


def test_no_image_gives_no_logits(tiny):
    model = create(tiny)
    logits = model(images(input_size(tiny), input_size(tiny), 0))
    assert logits.shape == (0, 1000)
    logits.sum().backward()


def test_features_only_returns_the_raw_stage_outputs(tiny):
    model, extractor = create(tiny), create(tiny, features_only=True)
    x = images()
    with torch.no_grad():
        want, got = model.forward_intermediates(x, intermediates_only=True), extractor(x)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def run_step(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Logits and all gradients."""
    for parameter in model.parameters():
        parameter.grad = None
    logits = model(x)
    logits.square().sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


def assert_steps_agree(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float = 256 * EPS) -> None:
    """Relative error of each tensor, of those that are more than rounding: the whole gradient sets the scale."""
    scale = max(x.norm() for x in want)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= tolerance * max(b.norm(), EPS * scale / tolerance), (a.shape, (a - b).norm(), b.norm())


def test_compiles_without_a_graph_break(tiny):
    torch.compiler.reset()
    model = create(tiny)
    x = images(input_size(tiny), input_size(tiny))
    want = run_step(model, x)
    assert_steps_agree(run_step(torch.compile(model, fullgraph=True, backend="aot_eager"), x), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_biformer", "test_halonet", "test_van"])
def test_inductor_computes_the_same(name):
    assert shutil.which("g++"), "inductor compiles with g++"
    torch.compiler.reset()
    model, x = create(name), images(input_size(name), input_size(name))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="inductor")(x), model(x), **CLOSE)


@pytest.mark.filterwarnings("ignore:.*isinstance.*LeafSpec:FutureWarning")  # torch.export's own
def test_exports_for_any_batch(tiny):
    model, x = create(tiny), images(input_size(tiny), input_size(tiny), batch=3)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), **CLOSE)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of torch's own operators under vmap
def test_torch_func_gives_the_gradients_of_autograd(tiny):
    model, x = create(tiny), images(input_size(tiny), input_size(tiny))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for number, image in enumerate(x):
        want = torch.autograd.grad(loss(dict(model.named_parameters()), image), list(model.parameters()))
        assert_steps_agree([each[name][number] for name in parameters], want)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_takes_another_batch_and_is_right_at_another_size_or_refuses_it(tiny):
    model, side = create(tiny), input_size(tiny)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(side, side), check_trace=False)
        for batch, height, width in ((1, side, side), (3, side, side), (1, 96, 128), (1, 224, 160)):
            x = images(height, width, batch)
            try:
                got = traced(x)
            except RuntimeError:
                assert (height, width) != (side, side)
            else:
                torch.testing.assert_close(got, model(x), **CLOSE)


def test_channels_last_gives_the_same_answer(tiny):
    model = create(tiny)
    want = run_step(model, images())
    got = run_step(model.to(memory_format=torch.channels_last), images().to(memory_format=torch.channels_last))
    assert_steps_agree(got, want)


def test_gradient_checkpointing_gives_the_same_step(tiny):
    model = create(tiny)
    want = run_step(model, images())
    model.set_grad_checkpointing()
    assert_steps_agree(run_step(model, images()), want)


def test_bfloat16_autocast_stays_within_its_rounding(tiny):
    model = create(tiny)
    with torch.no_grad():
        want = model(images())
        with torch.autocast("cpu", torch.bfloat16):
            got = model(images())
    # One rounding to bfloat16 a layer, of which there are fewer than 64; errors add as squares.
    assert (got - want).norm() <= 64**0.5 * torch.finfo(torch.bfloat16).eps * want.norm()


def test_fine_tuning_starts_from_another_head_and_other_channels(tiny):
    overlay = {"state_dict": create(tiny).state_dict()}
    model = create(tiny, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1)
    assert model(images()[:, :1]).shape == (2, 7)


def test_layer_decay_and_weight_decay_exclusions_reach_the_optimiser(tiny):
    model = create(tiny)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) > 4
    undecayed = {id(x) for group in optimizer.param_groups if not group["weight_decay"] for x in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in undecayed) == (parameter.ndim == 1 or name.endswith(UNDECAYED)), name


def test_an_image_alone_gets_the_gradient_that_it_gets_in_company(tiny):
    model, gradients = create(tiny), []
    # torch 2.14's batch norm loses its way in a map whose batch of one has strides of its own, as authors' code makes.
    for batch in (1, 2):
        x = images(batch=1).repeat(batch, 1, 1, 1).requires_grad_()
        model(x)[0].square().sum().backward()
        gradients.append(x.grad[:1])
    assert_steps_agree(gradients[:1], gradients[1:])


@pytest.mark.parametrize("classes", [0, 5])
def test_a_saved_model_loads_from_its_folder(tiny, classes, tmp_path):
    model = create(tiny, num_classes=5)
    save_for_hf(model, tmp_path, model_config={"num_classes": 5})
    loaded = create(f"local-dir:{tmp_path}", pretrained=True, num_classes=classes)
    want = model if classes else model.forward_features
    got = loaded if classes else loaded.forward_features
    with torch.no_grad():
        assert torch.equal(got(images()), want(images()))


def test_init_weights_fills_a_model_made_without_memory(tiny):
    with torch.device("meta"):
        model = timm.create_model(tiny)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    assert torch.isfinite(model.eval()(images())).all()
