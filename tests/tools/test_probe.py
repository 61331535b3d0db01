import probe as tool
import pytest
import timm
import torch
from training.generated import write_pictures

from visionattn.training.config import DataConfig
from visionattn.training.model import save_model
from visionattn.training.probing import (
    Features,
    MultiQueryProbe,
    probe_features,
    score_attentive,
    score_knn,
    score_linear,
)

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


def backbone(name: str):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, **CONFIG}
    return model


@pytest.mark.parametrize("name", ["test_nat", "test_resnet", "test_vit"])
def test_all_probes_tell_colours_apart_and_leave_the_backbone_alone(tmp_path, name):
    write_pictures(tmp_path, per_class=10)
    # The class token's model has a table of positions, so it takes its own size.
    model = backbone(name) if name != "test_vit" else timm.create_model(name, num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = DataConfig(root=str(tmp_path), val_fraction=0.3, batch_size=7, workers=0)
    found = probe_features(model, data, num_queries=8, epochs=20)
    assert list(found) == ["knn", "linear", "attentive"]
    assert min(found.values()) > 85, found
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_attentive_probe_pools_as_its_formula_says():
    torch.manual_seed(0)
    probe, tokens = MultiQueryProbe(12, 5, num_queries=3).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    wanted = torch.empty(2, 12, dtype=torch.float64)
    for image in range(2):
        values = tokens[image] @ probe.value.weight.T
        for query in range(3):
            weights = torch.softmax(tokens[image] @ probe.queries[query] / 12**0.5, 0)
            part = slice(4 * query, 4 * query + 4)
            wanted[image, part] = weights @ values[:, part]
    # Sums of 7 x 12 terms in float64.
    assert torch.allclose(probe.pool(tokens), wanted, rtol=0, atol=1e-13)


def test_the_attentive_probe_finds_what_the_mean_hides_and_no_probe_finds_nothing():
    generator = torch.Generator().manual_seed(0)

    def features(count: int, shown: float) -> Features:
        labels = torch.randint(2, (count,), generator=generator)
        tokens = torch.randn(count, 16, 8, generator=generator)
        # One token in sixteen is marked and carries the class; the mean has 16 noises for one signal.
        tokens[:, 0, 0] = 6 * shown
        tokens[:, 0, 1] = shown * 3 * (2.0 * labels - 1)
        return Features(tokens, tokens.mean(1), labels)

    train, val = features(400, 1.0), features(200, 1.0)
    assert score_attentive(train, val, num_queries=2) > score_linear(train, val) + 5
    blank = (features(400, 0.0), features(400, 0.0))
    # Four standard deviations of a guess on 400 are 10 %.
    for score in (score_attentive(*blank, num_queries=2), score_linear(*blank), score_knn(*blank)):
        assert 40 < score < 60


def test_neighbours_vote_by_their_cosine():
    train = Features(torch.zeros(3, 1, 2), torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 5.0]]), torch.tensor([0, 1, 1]))
    val = Features(torch.zeros(2, 1, 2), torch.tensor([[9.0, 0.1], [0.1, 9.0]]), torch.tensor([0, 1]))
    assert score_knn(train, val) == 100
    assert score_knn(train, Features(val.tokens, val.pooled.flip(0), val.labels)) == 0


@pytest.fixture
def saved(tmp_path):
    save_model(backbone("test_nat"), tmp_path / "best", ["blue", "green", "red"], CONFIG)
    return str(tmp_path / "best")


def test_the_tool_prints_a_line_a_probe(saved, tmp_path, capsys):
    pictures = str(write_pictures(tmp_path / "pictures", per_class=8))
    given = [pictures, "--checkpoint", saved, "--val-fraction", "0.25", "--workers", "0"]
    assert tool.main([*given, "--probes", "knn", "linear"]) == 0
    assert [line.partition(": top-1 ")[0] for line in capsys.readouterr().out.splitlines()] == ["knn", "linear"]
    assert tool.main([*given, "--probes", "kmm"]) == 1
    assert capsys.readouterr().err == "error: unknown probe 'kmm', wanted some of knn, linear, attentive\n"
    assert tool.main([*given, "--probes", "attentive", "--queries", "7"]) == 1
    assert "num_queries is 7, wanted a divisor" in capsys.readouterr().err
    for flag in ("--queries", "--epochs"):
        assert tool.main([*given, flag, "0"]) == 1
        assert capsys.readouterr().err == f"error: {flag[2:]} is 0, wanted at least 1\n"
