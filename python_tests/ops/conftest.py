"""Op tests compare with eager torch on small tensors, where its threads cost more than they give."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_reproducible: None) -> None:
    torch.set_num_threads(1)
