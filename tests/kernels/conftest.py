"""What the tests of operators share."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import triton_worker

from visionattn_kernels.benchmark import Comparison, compare
from visionattn_kernels.testing import Case


@pytest.fixture
def one_thread():
    """Runs a test on one thread, whose process time counts only what the test does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compare_alone():
    """`benchmark.compare` on one thread in a process of its own, as `tools/benchmark.py op` measures.

    In a process that has run other tests, memory that the allocator kept saves a baseline most of its page faults.
    """

    def run(case: Case, rounds: int = 7) -> Comparison:
        one = ProcessPoolExecutor(1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
        with one as pool:
            return pool.submit(compare, case, rounds).result()

    return run


@pytest.fixture(scope="session")
def interpreter():
    """Processes whose kernels run in the interpreter: the environment decides that before Triton is imported."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=triton_worker.interpret) as pool:
        yield pool
