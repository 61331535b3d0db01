import json
import math

import pytest
import timm
import torch

from visionattn.training.entropy import attention_entropy
from visionattn.training.loop import train
from visionattn_kernels import OPS


class Attention(torch.nn.Module):
    """Neighborhood attention with a bias on (B, 3 x heads x D, H, W)."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(bias)

    def forward(self, x):
        query, key, value = x.unflatten(1, (3, 2, 8)).movedim(3, 5).unbind(1)
        return OPS["neighborhood_attention"].call(query, key, value, kernel_size=3, bias=self.bias)


def test_the_entropy_of_an_operator_is_that_of_its_weights():
    torch.manual_seed(0)
    model = torch.nn.Sequential(Attention(2 * torch.randn(2, 5, 5)))
    images = 2 * torch.randn(1, 48, 6, 7)
    query, key, _ = images.unflatten(1, (3, 2, 8)).movedim(3, 5).double().unbind(1)
    # The reference on one-hot values gives the weights themselves.
    positions = torch.eye(42, dtype=torch.float64).view(42, 6, 7).movedim(0, 2).expand(1, 2, 6, 7, 42)
    padded = [torch.cat([x, torch.zeros(1, 2, 6, 7, 34, dtype=torch.float64)], -1) for x in (query, key)]
    weights = OPS["neighborhood_attention"].reference(
        *padded, positions, kernel_size=3, bias=model[0].bias.double(), scale=8**-0.5
    )
    wanted = -torch.special.xlogy(weights, weights).sum(-1).mean()
    assert attention_entropy(model, images) == {"0": pytest.approx(wanted.item(), abs=2e-3)}


def test_equal_keys_give_the_logarithm_of_their_number():
    model = torch.nn.Sequential(Attention(torch.zeros(2, 5, 5)))
    assert attention_entropy(model, torch.zeros(1, 48, 6, 6))["0"] == pytest.approx(math.log(9), abs=1e-4)


@pytest.mark.parametrize(("name", "modules"), [("test_nat", "attn"), ("test_biformer", "attn"), ("test_vit", "attn")])
def test_every_attention_of_a_model_is_measured_and_the_model_left_alone(name, modules):
    torch.manual_seed(0)
    model = timm.create_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = attention_entropy(model, torch.randn(1, *model.pretrained_cfg["input_size"]))
    blocks = {key for key, module in model.named_modules() if key.endswith(f".{modules}")}
    assert {key.partition(f".{modules}")[0] + f".{modules}" for key in found} == blocks
    assert all(value > 0 for value in found.values())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_without_attention_has_none():
    assert attention_entropy(timm.create_model("test_resnet"), torch.randn(1, 3, 64, 64)) == {}


def test_a_run_writes_a_line_an_epoch(configure):
    run = train(configure("attention_entropy=true", "report=false"))
    lines = [json.loads(line) for line in (run.folder.path / "attention_entropy.jsonl").read_text().splitlines()]
    assert [line.pop("epoch") for line in lines] == [1, 2]
    assert lines[0].keys() == lines[1].keys()
    assert len(lines[0]) == sum(name.endswith(".attn") for name, _ in run.bare_model.named_modules())
