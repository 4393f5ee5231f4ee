"""A tokenizer of whole words, for tiny models."""

import re
from types import SimpleNamespace

import torch


class WordTokenizer:
    """Ids by order of appearance, modulo the vocabulary; decoding gives the last word of an id."""

    chat_template = None
    eos_token_id = None

    def __init__(self, vocab_size: int = 98) -> None:
        self.vocab_size, self.words, self.ids = vocab_size, {}, {}

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = []
        for word in re.findall(r"\s*\S+|\s+$", text):
            n = self.ids.setdefault(word, 3 + len(self.ids) % (self.vocab_size - 3))
            self.words[n] = word
            ids.append(n)
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)

    def decode(self, ids, skip_special_tokens=False):
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        return "".join(self.words.get(i, " ?") for i in ids)
