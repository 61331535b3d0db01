import pytest
import timm
import torch

from visionattn.training.loop import train_one_epoch
from visionattn.training.model import save_model
from visionattn.training.run import Run

OWN = {"input_size": (3, 32, 32), "mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4)}


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(3)
    model = timm.create_model("test_nat", num_classes=3)
    save_model(model, tmp_path / "teacher", ["blue", "green", "red"], OWN)
    return model.eval()


def test_the_teacher_sees_pictures_in_its_own_normalisation(configure, teacher, tmp_path):
    given = (f"distill.teacher=local-dir:{tmp_path / 'teacher'}", "data.mean=[0.1,0.2,0.3]")
    run = Run(configure(*given, "data.std=[0.5,0.6,0.7]"))
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(run.data_config[key]).view(3, 1, 1) for key in ("mean", "std"))
    own_mean, own_std = (torch.tensor(OWN[key]).view(3, 1, 1) for key in ("mean", "std"))
    wanted = teacher((pixels - own_mean) / own_std)
    assert torch.allclose(run.distill.teach((pixels - mean) / std), wanted, atol=1e-5)


def test_the_loss_is_the_weighted_sum_and_the_teacher_stays_as_it_was(configure, teacher, tmp_path):
    given = (f"distill.teacher=local-dir:{tmp_path / 'teacher'}", "distill.weight=0.25")
    run = Run(configure(*given, "distill.temperature=2"))
    images, logits = torch.randn(4, 3, 32, 32), torch.randn(4, 3)
    student, taught = (logits / 2).softmax(1), (run.distill.teach(images) / 2).softmax(1)
    divergence = (taught * (taught / student).log()).sum(1).mean()
    found = run.distill(torch.tensor(2.0), logits, images)
    assert found.item() == pytest.approx(0.75 * 2.0 + 0.25 * 4 * divergence.item(), rel=1e-5)
    before = {name: value.clone() for name, value in run.distill.teacher.model.state_dict().items()}
    train_one_epoch(run, 0)
    assert all(torch.equal(value, before[name]) for name, value in run.distill.teacher.model.state_dict().items())


def test_a_teacher_without_its_file_or_of_other_classes_is_an_error(configure, tmp_path):
    with pytest.raises(ValueError, match=r"distill\.weights nowhere is not a file"):
        Run(configure("distill.teacher=test_nat", "distill.weights=nowhere"))
    torch.save(timm.create_model("test_nat").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="test_nat knows 1000 classes, wanted 3"):
        Run(configure("distill.teacher=test_nat", f"distill.weights={tmp_path / 'other.pth'}"))


def test_a_teacher_that_knows_the_classes_in_another_order_is_an_error(configure, teacher, tmp_path):
    save_model(teacher, tmp_path / "other", ["green", "blue", "red"], OWN)
    with pytest.raises(ValueError, match="other has the class green where the data has blue"):
        Run(configure(f"distill.teacher=local-dir:{tmp_path / 'other'}"))
