"""The layering holds, importing is cheap, and the tree keeps its shape."""

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "visionattn", ROOT / "kernels" / "visionattn_kernels"]
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
BUDGET = 450

# Packages of each layer, top to bottom; a layer imports itself and what stands below it.
LAYERS = [
    [
        "visionattn.training",
        "visionattn.openmmlab",
        "visionattn.mm_checkpoint",
        "visionattn.mm_run",
        "visionattn.mmcv_ext",
    ],
    ["visionattn.backbones"],
    ["visionattn.layers"],
    ["visionattn_kernels"],
]


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[0] else ROOT)
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Modules imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    name, used = module_name(path), imports(path)
    depth = next((i for i, layer in enumerate(LAYERS) if any(inside(name, package) for package in layer)), None)
    for package in [package for layer in LAYERS[:depth] for package in layer] if depth else []:
        assert not any(inside(other, package) for other in used), package


def test_kernels_know_neither_timm_nor_the_zoo_and_only_the_triton_folder_knows_triton():
    for path in SOURCES:
        name, used = module_name(path), imports(path)
        if inside(name, "visionattn_kernels"):
            assert not any(inside(other, package) for other in used for package in ("visionattn", "timm")), name
        if not inside(name, "visionattn_kernels.triton"):
            assert not any(inside(other, "triton") for other in used), name


def test_dense_prediction_and_training_reach_models_through_timm():
    for path in SOURCES:
        if module_name(path).startswith(("visionattn.training", "visionattn.openmmlab", "visionattn.mm")):
            assert not any(inside(other, "visionattn.backbones") for other in imports(path)), path


def test_backbones_do_not_import_each_other():
    families = {path.stem: path for path in (ROOT / "visionattn" / "backbones").glob("[!_]*.py")}
    for name, path in families.items():
        others = {f"visionattn.backbones.{other}" for other in families if other != name}
        assert not others & imports(path), name


@pytest.mark.parametrize("path", SOURCES + sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_files_keep_their_budget(path):
    assert len(path.read_text().splitlines()) <= BUDGET


def test_test_files_have_names_of_their_own():
    # pytest refuses to collect two of one name, which only shows where the extras of both are installed.
    names = [path.name for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    assert len(names) == len({*names})


def test_kernels_folder_does_not_shadow_the_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(code: str) -> str:
    """Output of `code` in a fresh interpreter that treats warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_triton_code_of_ours_and_no_heavy_package():
    before, after = json.loads(
        run(
            "import json, sys, timm; before = list(sys.modules); import visionattn; "
            "print(json.dumps([before, list(sys.modules)]))"
        )
    )
    added = set(after) - set(before)
    heavy = (
        "visionattn_kernels.triton",
        "triton",
        "accelerate",
        "albumentations",
        "mmengine",
        "mmcv",
        "mmdet",
        "mmseg",
    )
    assert "visionattn.backbones.nat" in added
    assert not [name for name in added if any(inside(name, package) for package in heavy)]


def test_importing_works_where_triton_does_not():
    blocked = "import sys; sys.modules['triton'] = None; import torch, timm, visionattn; "
    assert run(blocked + "print(timm.create_model('test_nat')(torch.zeros(1, 3, 64, 64)).shape[1])").strip() == "1000"


def test_names_of_timm_keep_their_weights():
    code = (
        "import timm; before = set(timm.list_models()); weights = timm.list_pretrained(); import visionattn; "
        "print(len(before - set(timm.list_models())), set(weights) <= set(timm.list_pretrained()))"
    )
    assert run(code).split() == ["0", "True"]


@pytest.mark.speed
def test_importing_adds_at_most_half_a_second_to_timm():
    code = "import time, timm; start = time.perf_counter(); import visionattn; print(time.perf_counter() - start)"
    assert statistics.median(float(run(code)) for _ in range(5)) <= 0.5
