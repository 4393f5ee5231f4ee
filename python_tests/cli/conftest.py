"""A tiny random model and a document, for all tests of the command line."""

from __future__ import annotations

import pytest
import torch
from cli_runner import DOCUMENT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Qwen2 model folder of 2 layers with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([DOCUMENT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, eos_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "document.txt"
    path.write_text(DOCUMENT)
    return path
