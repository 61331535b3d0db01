"""Checkouts of the authors' repositories are timed beside ours, and leave nothing behind. The checkouts are made up."""

import re
import sys

import pytest
import timm
import torch
from authors import _rearrange
from benchmark import main

NET = """
from einops import rearrange
from timm.models import register_model
from timm.models.layers import to_2tuple
from torch import nn

class Net(nn.Module):
    def __init__(self, drop_path_rate):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, to_2tuple(4), 4), nn.Linear(8, 1000)
        self.drop = nn.Dropout(drop_path_rate)

    def forward(self, x):
        return self.head(self.drop(rearrange(self.stem(x), "b c h w -> b (h w) c").mean(1)))
"""
VAN = {
    "VAN-Classification/models/__init__.py": "raise ImportError('what nothing here needs')",
    "VAN-Classification/models/van.py": NET
    + """
from timm.models.registry import register_model as register

@register
@register_model
def van_b0(pretrained=False, **kwargs):
    print("noise")
    return Net(**kwargs)
""",
}
INLINE = {
    "InLine/models/net.py": NET,
    "InLine/models/build.py": "from .net import Net\ndef build_model(config): return Net(config.MODEL.DROP)",
    "InLine/config.py": "from yacs.config import CfgNode\n_C = CfgNode()\n_C.MODEL = CfgNode()\n_C.MODEL.DROP = 2.0",
    "InLine/cfgs/inline_deit_t.yaml": "MODEL: {DROP: 0.5}",
}


@pytest.mark.parametrize(("name", "files"), [("van_b0", VAN), ("inline_deit_tiny", INLINE)])
def test_a_checkout_is_timed_beside_ours_and_leaves_nothing_behind(name, files, tmp_path, capsys):
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    ours, modules, path = timm.models.model_entrypoint(name), dict(sys.modules), list(sys.path)
    arguments = ["test_resnet", f"authors_{name}", "--size", "32", "--rounds", "1"]
    threads = ["--threads", str(torch.get_num_threads())]
    assert main(["model", *arguments, "--authors", str(tmp_path), *threads]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"authors_{name} +\d+ ms, [\d.]+ +\d+ ms, [\d.]+ +\d+ MiB", printed)
    assert "noise" not in printed
    assert timm.models.model_entrypoint(name) is ours
    assert sys.path == path
    imported = {key: module for key, module in sys.modules.items() if modules.get(key) is not module}
    assert not [key for key in imported if re.match(r"models|einops|yacs|config|timm\.models\.(layers|registry)", key)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("authors_van_b9", r"wanted one of authors_biformer_stl.*authors_van_b0, .*got authors_van_b9"),
        ("authors_van_b0", r"wanted a checkout of github.com/Visual-Attention-Network/VAN-Classification at e19779b"),
    ],
)
def test_what_there_is_no_code_of_is_told(name, message, tmp_path, capsys):
    arguments = ["--authors", str(tmp_path), "--threads", str(torch.get_num_threads())]
    assert main(["model", name, *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("pattern", "sizes", "want"),
    [
        ("b c h w -> b h w c", {}, lambda x: x.permute(0, 2, 3, 1)),
        ("b c h w -> b (h w) c", {"h": 4}, lambda x: x.flatten(2).mT),
        ("b (m d) h w -> m b (h w) d", {"m": 3}, lambda x: x.view(2, 3, 2, 20).permute(1, 0, 3, 2)),
        ("n c (j h) (i w) -> n (j i) h w c", {"j": 2, "i": 5},
         lambda x: x.view(2, 6, 2, 2, 5, 1).permute(0, 2, 4, 3, 5, 1).flatten(1, 2)),
    ],
)  # fmt: skip
def test_the_stand_in_for_einops_rearranges(pattern, sizes, want):
    x = torch.arange(240).view(2, 6, 4, 5)
    assert torch.equal(_rearrange(x, pattern, **sizes), want(x))
