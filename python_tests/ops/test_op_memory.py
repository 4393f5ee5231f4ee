"""Memory of pools: 2 MB pages are asked for where they fit, and nothing else changes."""

import ctypes
import re
import sys
from pathlib import Path

import pytest
import torch

from smartkv_ext.ops import memory
from smartkv_ext.ops.memory import HUGE_PAGE, ask_for_huge_pages, empty_pool


@pytest.mark.parametrize("size", [2 * HUGE_PAGE - 1, 2 * HUGE_PAGE, 5 * HUGE_PAGE + 4096, 64])
def test_only_whole_pages_within_are_asked_for(size, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *call: asked.append(call) or 0)
    x = empty_pool(1, size, torch.device("cpu"))
    assert x.shape == (1, size) and x.dtype == torch.uint8
    if size < 2 * HUGE_PAGE:
        assert not asked
        return
    [(begin, length, advice)] = asked
    assert begin % HUGE_PAGE == 0 and length % HUGE_PAGE == 0 and advice == 14
    assert x.data_ptr() <= begin and begin + length <= x.data_ptr() + size < begin + length + HUGE_PAGE


def test_a_system_that_refuses_is_no_error(monkeypatch):
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *call: -1)
    assert not ask_for_huge_pages(torch.empty(4 * HUGE_PAGE, dtype=torch.uint8))
    assert empty_pool(4, HUGE_PAGE, torch.device("cpu")).nbytes == 4 * HUGE_PAGE
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert not ask_for_huge_pages(torch.empty(4 * HUGE_PAGE, dtype=torch.uint8))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_the_system_notes_the_wish():
    assert sys.platform.startswith("linux")
    x = empty_pool(64, HUGE_PAGE // 8, torch.device("cpu"))
    if not ask_for_huge_pages(x):
        pytest.skip(f"no transparent huge pages here: {ctypes.get_errno()}")
    middle = x.data_ptr() + x.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert " hg" in line
            return
    raise AssertionError("the pool is in no mapping")
