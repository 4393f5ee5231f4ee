"""A tiny random model and a document, for all tests of the command line."""

from __future__ import annotations

import pytest
from cli_runner import DOCUMENT
from hf.tiny import write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Qwen2 model folder of 2 layers with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("model")
    write_model(path, DOCUMENT)
    return path


@pytest.fixture(scope="session")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "document.txt"
    path.write_text(DOCUMENT)
    return path
