"""Every test starts from the same seed, on one thread, and with NaN in memory that nothing has written yet."""

from __future__ import annotations

import jaxtyping
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread_for_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """``torch.empty`` and its kin hand out NaN (integers: the largest), so that reading memory before writing it shows.

    Not under torch.compile, whose memory planning is its own.
    """
    torch.manual_seed(0)
    if request.node.get_closest_marker("compile"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def unchecked():
    """Without the annotation check of the test run, which would refuse wrong shapes before the library does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
