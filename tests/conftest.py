"""Tests with an argument `tiny` run on every family's smallest model, those with `variant` on every published one."""

from zoo import PUBLISHED, TINY


def pytest_generate_tests(metafunc):
    """Parametrise by the name of the argument."""
    for argument, names in (("tiny", TINY), ("variant", PUBLISHED)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)
