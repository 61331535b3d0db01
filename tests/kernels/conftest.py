"""What the tests of operators share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Runs a test on one thread, whose process time counts only what the test does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
