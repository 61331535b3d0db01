"""What only Agent Attention has: agents of another number or shape than trained, and bias tables of another size."""

import pytest
import timm
import torch
import torch.nn.functional as F

from visionattn.backbones._agent import AgentAttention

# A handful of float32 roundings in another order, on answers of magnitude one.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def create(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def loaded(name: str, weights: dict[str, torch.Tensor], **kwargs) -> torch.nn.Module:
    return create(name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights}, **kwargs)


def agents_of(model: torch.nn.Module) -> list[AgentAttention]:
    return [module for module in model.modules() if isinstance(module, AgentAttention)]


def images(side: int = 96) -> torch.Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def resized(x: torch.Tensor, *size: int) -> torch.Tensor:
    return F.interpolate(x, size, mode="bilinear")


def test_dense_biases_are_summed_at_the_training_size_then_follow_the_map_and_then_the_agents():
    torch.manual_seed(0)
    attn = AgentAttention(8, num_heads=2, num_agents=9, side=7)
    attn.shape = [5, 4]
    gather, give = attn.biases(10, 6)

    def by_agents(blocks: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
        """Tables (heads, 9, 7, 7), pixel by pixel."""
        table = resized(blocks, 10, 6) + resized(lines, 10, 6)
        grids = [resized(table[..., y, x].view(2, 1, 3, 3), 5, 4).flatten(1) for y in range(10) for x in range(6)]
        return torch.stack(grids, 2)

    torch.testing.assert_close(gather, by_agents(attn.an_bias, attn.ah_bias + attn.aw_bias), **CLOSE)
    rows_and_columns = (attn.ha_bias + attn.wa_bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(give, by_agents(attn.na_bias, rows_and_columns).transpose(1, 2), **CLOSE)


@pytest.mark.parametrize("name", ["test_agent_pvt", "test_agent_swin"])
def test_the_dense_preset_has_the_authors_agents_and_changes_no_weight(name):
    trained = create(name)
    dense = create(name, agent_shapes="dense")
    dense.load_state_dict(trained.state_dict())
    shapes = {"test_agent_pvt": [[12, 12], [16, 16], [28, 28], [28, 28]], "test_agent_swin": [[9, 9], [12, 12]]}
    for stage, shape in zip(dense.stages, shapes[name], strict=False):
        assert agents_of(stage)[0].shape == shape
    with torch.no_grad():
        want = trained(images())
        assert not torch.equal(dense(images()), want)
        dense.set_agent_shapes("classification")
        assert torch.equal(dense(images()), want)


def test_dense_mode_with_the_agents_of_training_is_the_classifier_where_no_window_shifts():
    shapes = ((3, 3), (4, 4), (7, 7), (7, 7))
    trained, dense = create("test_agent_pvt"), create("test_agent_pvt", agent_shapes=shapes)
    with torch.no_grad():
        assert torch.equal(dense(images()), trained(images()))


def test_dense_mode_shifts_every_other_window_even_where_one_covers_the_map():
    model = create("test_agent_swin", agent_shapes="dense", depths=(1, 2, 2, 2), linear_depths=(1, 2, 0, 0))
    shifted = [module for module in model.modules() if getattr(module, "shift", 0) > 0]
    assert shifted
    assert all(module.always_shift for module in shifted)


@pytest.mark.parametrize(
    ("shapes", "message"), [("sparse", "must be one of"), (((3, 3),), "must have 4 pairs"), ("dense", "must be one of")]
)
def test_agent_shapes_that_do_not_exist_or_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        create("test_agent_cswin", agent_shapes=shapes)


@pytest.mark.parametrize("family", ["agent", "inline"])
@pytest.mark.parametrize(("trunk", "smallest"), [("deit", 16), ("pvt", 32), ("swin", 32), ("cswin", 32)])
def test_the_smallest_image_size_leaves_the_last_stage_a_position_and_smaller_ones_are_refused(family, trunk, smallest):
    name = f"test_{family}_{trunk}"
    with torch.no_grad():
        assert create(name, img_size=smallest)(images(smallest)).shape == (1, 1000)
    with pytest.raises(ValueError, match=f"img_size must be at least {smallest}, got {smallest - 1}"):
        create(name, img_size=smallest - 1)


@pytest.mark.parametrize("name", ["test_agent_deit", "test_agent_cswin"])
def test_a_checkpoint_brings_its_own_number_of_agents(name):
    weights = create(name, num_agents=(4, 9, 25, 25)).state_dict()
    model = loaded(name, weights)
    counts = [attn.an_bias.shape[1] for attn in agents_of(model)]
    assert counts == [x.shape[1] for key, x in weights.items() if key.endswith("an_bias")]
    with torch.no_grad():
        assert torch.equal(model(images()), create(name, num_agents=(4, 9, 25, 25))(images()))


@pytest.mark.parametrize("name", ["test_agent_deit", "test_agent_pvt", "test_agent_swin", "test_agent_cswin"])
def test_tables_of_another_image_size_are_resized_as_the_authors_do(name):
    small = create(name).state_dict()
    large = loaded(name, small, img_size=128).state_dict()
    resizing = {
        "ah_bias": lambda x, n: F.interpolate(x[..., 0], n, mode="linear")[..., None],
        "aw_bias": lambda x, n: F.interpolate(x[..., 0, :], n, mode="linear")[..., None, :],
        "ha_bias": lambda x, n: F.interpolate(x[..., 0, :].mT, n, mode="linear").mT[..., None, :],
        "wa_bias": lambda x, n: F.interpolate(x[..., 0, :, :].mT, n, mode="linear").mT[..., None, :, :],
    }
    seen = set()
    for key, x in small.items():
        kind = key.rsplit(".", 1)[-1]
        if kind in resizing:
            want = resizing[kind](x, max(large[key].shape[1:3] if kind[1:2] == "a" else large[key].shape[2:]))
            torch.testing.assert_close(large[key], want, **CLOSE)
            seen.add(kind)
        elif kind == "relative_position_bias_table":
            side = round(len(large[key]) ** 0.5)
            grid = x.T.view(1, x.shape[1], round(len(x) ** 0.5), -1)
            want = F.interpolate(grid, (side, side), mode="bicubic")[0].flatten(1).T
            torch.testing.assert_close(large[key], want, **CLOSE)
        elif kind in ("pos_embed", "token_embed"):
            first = int(kind == "token_embed")
            side = round((large[key].shape[1] - first) ** 0.5)
            grid = x[:, first:].mT.unflatten(2, (round((x.shape[1] - first) ** 0.5), -1))
            want = F.interpolate(grid, (side, side), mode="bicubic").flatten(2).mT
            torch.testing.assert_close(large[key][:, first:], want, **CLOSE)
            assert torch.equal(large[key][:, :first], x[:, :first])
        else:
            assert torch.equal(large[key], x)
    assert seen == resizing.keys()
