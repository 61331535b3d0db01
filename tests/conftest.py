"""Tests with an argument `tiny` run on every family's smallest model, those with `variant` on every published one."""

import os

# Processes that run tests side by side share the cores, and so must what they start: threads that wait for one another
# on a core that is not free take ten times as long. Read by torch where it is imported.
if (processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))) > 1:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))

from zoo import PUBLISHED, TINY


def pytest_generate_tests(metafunc):
    """Parametrise by the name of the argument."""
    for argument, names in (("tiny", TINY), ("variant", PUBLISHED)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)
