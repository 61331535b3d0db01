"""timm's own test file passes for our smallest models, and its configuration check for every variant.

timm ships its tests in its source distribution, which pip fetches once a run.
"""

import os
import re
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from zoo import PUBLISHED, TINY

pytestmark = pytest.mark.timm

PLUGIN = Path(__file__).parent / "timm_suite"
# Every check of timm's test_models.py that takes a model's name and needs no download.
CHECKS = 11


@pytest.fixture(scope="session")
def timm_tests(tmp_path_factory) -> Path:
    """A folder with timm's tests and settings, without its package, which would shadow the installed one."""
    folder = tmp_path_factory.mktemp("timm")
    wanted = f"timm=={version('timm')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder]
    subprocess.run([*pip, wanted], check=True, timeout=300)
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        members = [m for m in archive.getmembers() if re.match(r"[^/]+/(tests/|pyproject\.toml$)", m.name)]
        archive.extractall(folder, members, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def run_timm(tests: Path, models: list[str], *options: str) -> tuple[int, str]:
    """Number of passed tests and the output of timm's test file, narrowed to `models`."""
    env = os.environ | {"VISIONATTN_MODELS": ",".join(models), "PYTHONPATH": str(PLUGIN)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "only_ours",
        "tests/test_models.py",
        "-q",
        "-W",
        "ignore",
        *options,
    ]
    done = subprocess.run(command, cwd=tests, env=env, capture_output=True, text=True, timeout=1200)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return int(passed[1]), done.stdout


def test_every_check_of_timm_passes_for_the_smallest_model_of_each_family(timm_tests):
    passed, output = run_timm(timm_tests, TINY)
    assert passed == CHECKS * len(TINY), output
    assert not re.search(r"\d+ (skipped|xfailed)", output), output


def test_the_configuration_check_of_timm_passes_for_every_variant_and_tag(timm_tests):
    # Three seconds a variant, none of them in parallel code: two processes take half the time.
    halves = [PUBLISHED[::2], PUBLISHED[1::2]]
    with ThreadPoolExecutor(len(halves)) as pool:
        runs = pool.map(lambda half: run_timm(timm_tests, half, "-k", "test_model_default_cfgs"), halves)
        for half, (passed, output) in zip(halves, runs, strict=True):
            assert passed >= len(half), output
