import json

import pytest
from huggingface_hub import HfApi, constants

from visionattn.training.loop import train
from visionattn.training.run import Run


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")


def test_the_best_model_and_its_card_are_what_is_uploaded(configure, logged_in, monkeypatch):
    created, uploaded = [], []

    def create_repo(api, repo_id, **options):
        created.append((repo_id, options))

    def upload_folder(api, *, repo_id, folder_path, **options):
        uploaded.append((repo_id, {path.name: path.read_bytes() for path in folder_path.iterdir()}))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    run = train(configure("schedule.epochs=1", "push_to_hub=somebody/tiny"))
    assert created == [("somebody/tiny", {"private": True, "exist_ok": True})]
    [(where, files)] = uploaded
    assert where == "somebody/tiny"
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert all(content == (run.folder.best / name).read_bytes() for name, content in files.items())
    assert json.loads(files["config.json"])["architecture"] == "test_nat"
    assert b'create_model("hf-hub:somebody/tiny", pretrained=True)' in files["README.md"]
    assert "pushed to somebody/tiny" in (run.folder.path / "train.log").read_text()


def test_a_hub_that_cannot_be_reached_is_named_in_the_log_and_costs_no_file(configure, logged_in, monkeypatch):
    # The library itself, against a port on which nobody listens.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    once = ("schedule.epochs=1", "push_to_hub=somebody/tiny")
    run = train(configure(*once))
    assert "warning: cannot push to somebody/tiny: " in (run.folder.path / "train.log").read_text()
    assert sorted(path.name for path in run.folder.best.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (run.folder.path / "report.html").is_file()

    tried = []
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: None)
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, *, repo_id, **options: tried.append(repo_id))
    before = run.folder.load_last()["history"]
    assert train(configure(*once, "resume=true")).history == before
    assert tried == ["somebody/tiny"]


def test_nothing_is_uploaded_unless_asked(configure, logged_in, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", lambda *arguments, **options: pytest.fail("a repository was made"))
    train(configure("schedule.epochs=1"))


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("tiny", "hf_of_nobody", "push_to_hub is 'tiny', wanted USER/NAME"),
        ("a/b/c", "hf_of_nobody", "push_to_hub is 'a/b/c', wanted USER/NAME"),
        ("somebody/tiny", "", "push_to_hub=somebody/tiny needs a login"),
    ],
)
def test_what_cannot_be_pushed_is_an_error_before_the_training(configure, tmp_path, monkeypatch, name, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=message):
        Run(configure(f"push_to_hub={name}"))
