"""Everything here has the marker `mm`, and is left alone where OpenMMLab's packages are not installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("mmengine") else ["test_*.py"]


def pytest_collection_modifyitems(items):
    """Mark what lies in this folder; warnings of OpenMMLab's packages, which are no longer maintained, are theirs."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.mm)
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def own_visualizer():
    """Drop the visualizer: mmengine has one of a name in a process, which logs into the folder of its first run."""
    yield
    from mmengine.visualization import Visualizer

    for kind in (Visualizer, *Visualizer.__subclasses__()):
        kind._instance_dict.clear()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with drawn shapes and the configs that learn from them."""
    import shapes

    root = tmp_path_factory.mktemp("shapes")
    shapes.write_all(root)
    return root
