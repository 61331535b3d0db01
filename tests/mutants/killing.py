"""Applies a seeded fault to a copy of the packages and runs the tests that must notice it."""

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from faults import Fault

ROOT = Path(__file__).parents[2]
PACKAGES = ["visionattn", "kernels/visionattn_kernels"]
# What every test imports is there already; only the packages themselves are new to each process.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["timm", "torch._inductor", "hypothesis"])
# Of plugins that these have imported already: an assertion of theirs would tell less.
REWRITE = "pytest.PytestAssertRewriteWarning"
# Exit statuses of pytest. Anything else, such as a fault that keeps tests from being collected, is no verdict.
PASSED, FAILED = 0, 1


def run(tests: Sequence[str], fault: Fault | None = None) -> tuple[int, str]:
    """Exit status of pytest on a copy of the packages with the fault in it, and the name of the test that failed."""
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        if fault:
            path = Path(folder) / fault.path
            path.write_text(mutate(path.read_text(), fault))
        output = Path(folder) / "output"
        process = PROCESSES.Process(target=_pytest, args=(folder, output, tests))
        process.start()
        process.join()
        text = output.read_text()
    failed = re.search(r"^FAILED \S+?::([^\s\[]+)", text, re.MULTILINE)
    return process.exitcode, failed[1] if failed else text[-1000:]


def _pytest(folder: str, output: Path, tests: Sequence[str]) -> None:
    """Run tests on the packages in a folder, in a process of their own that has imported neither."""
    packages = [folder, f"{folder}/kernels"]
    sys.path[:0] = packages
    os.environ |= {"PYTHONPATH": os.pathsep.join(packages), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    os.chdir(ROOT)
    torch.set_num_threads(1)  # others run beside it
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", f"ignore::{REWRITE}", *tests])
        sys.stdout.flush()
    os._exit(status)  # without waiting for what the tests have left


def mutate(source: str, fault: Fault) -> str:
    """The source with the fault in it.

    Raises:
        ValueError: What the fault replaces is not there, or more than once.
    """
    if (found := source.count(fault.before)) != 1:
        raise ValueError(f"{fault.name}: {fault.before!r} is {found} times in {fault.path}, wanted once")
    return source.replace(fault.before, fault.after)


@lru_cache
def sound(tests: Sequence[str]) -> None:
    """Raise RuntimeError where tests fail without any fault."""
    status, output = run(tests)
    if status != PASSED:
        raise RuntimeError(f"{' '.join(tests)} end with status {status} without any fault: {output}")


def judge(fault: Fault) -> tuple[int, str]:
    """As `run`, on tests that pass without the fault."""
    sound(fault.tests)
    return run(fault.tests, fault)
