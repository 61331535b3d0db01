"""What README.md shows works."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
from readme import blocks, runnable
from zoo import PUBLISHED

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("code", runnable("python"), ids=lambda code: code.splitlines()[-1][:40])
def test_python_block_runs(code, tmp_path):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    promised = [line.split("# ")[1] for line in code.splitlines() if line.startswith("print(") and "# " in line]
    assert done.stdout.splitlines()[: len(promised)] == promised


def test_every_shell_block_is_run_by_the_continuous_integration():
    script = (ROOT / ".ci" / "run").read_text()
    for number, _ in enumerate(runnable("bash"), 1):
        assert f"readme.py {number}" in script


def test_a_block_without_a_language_is_refused():
    with pytest.raises(ValueError, match="got 'console'"):
        blocks("```console\n$ ls\n```\n")


def test_the_table_names_every_model():
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    named = {name.strip("`,") for line in table for name in line.split() if name.startswith("`")}
    assert named == set(PUBLISHED)
    assert all(timm.is_model(name) for name in named)
