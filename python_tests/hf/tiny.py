"""Tiny random models of every supported kind, and prompts."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from smartkv_ext.hf import cache_kwargs

KINDS = ["qwen2", "qwen3", "llama", "mistral", "mistral_sliding", "qwen3_hybrid"]
_COMMON = dict(
    vocab_size=98, hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip


def tiny(kind: str, seed: int = 1, **overrides):
    """A random model with head_dim 64, two KV heads and logits that are far from uniform."""
    torch.manual_seed(seed)
    common = _COMMON | overrides
    if kind == "qwen2":
        config = Qwen2Config(**{k: v for k, v in common.items() if k != "head_dim"} | {"hidden_size": 256})
        model = Qwen2ForCausalLM(config)
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=None))
    elif kind == "mistral_sliding":
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=50))
    elif kind == "qwen3_hybrid":
        model = Qwen3ForCausalLM(Qwen3Config(**common, use_sliding_window=True, sliding_window=40, max_window_layers=2))
        assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def write_model(path, text):
    """A Qwen2 model folder of 2 layers with a byte-level tokenizer made for ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, eos_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)


def prompts(batch: int, length: int = 150, seed: int = 3):
    """(ids, mask) with left padding in every row but the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 98, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in zip(range(1, batch), (length // 3, length - 20), strict=False):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return ids, mask


def generate(model, ids, mask, cache=None, new=24, **kwargs):
    """Greedy generation with logits."""
    kwargs.setdefault("do_sample", False)
    return model.generate(
        ids, attention_mask=mask, **cache_kwargs(cache), max_new_tokens=new, return_dict_in_generate=True,
        output_logits=True, **kwargs,
    )  # fmt: skip


def assert_same(a, b, atol=1e-4):
    """Equal tokens, logits within atol."""
    assert torch.equal(a.sequences, b.sequences)
    worst = max((x - y).abs().max().item() for x, y in zip(a.logits, b.logits, strict=True))
    assert worst <= atol, f"logits differ by {worst}"
