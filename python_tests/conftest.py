"""Shared by all Python tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Shared runners stall now and then: a deadline per example would fail tests that are right.
settings.register_profile("smartkv", deadline=None, derandomize=True)
settings.load_profile("smartkv")


@pytest.fixture(autouse=True)
def _reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test starts from the same seed, on one thread unless it is slow: on tiny tensors, and on a busy machine,
    threads mostly wait for each other.
    """
    threads = torch.get_num_threads()
    if "slow" not in request.keywords:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
