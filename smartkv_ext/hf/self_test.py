"""A tiny random model of every supported type: exact where nothing is lost, within its bytes where something is.

What a release of transformers may change without a word shows here, on the user's machine, in a second.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from smartkv_ext.cache import SmartKVCache

from .compat import cache_kwargs, tried
from .patching import SUPPORTED, patch

TOKENS, STEPS = 384, 3  # a budget of a half has room for more than the dense window
BUDGET = 0.5
TOLERANCE = 1e-4  # of logits of order 1, float32
_TINY = dict(
    vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=64, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip


@torch.no_grad()
def check_type(model_type: str) -> str | None:
    """None, or in a sentence what is wrong with a model type under the installed transformers."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **_TINY)).eval()
            ids = torch.randint(3, 64, (1, TOKENS + STEPS))
        with patch(model):
            return _compare(model, ids)
    except Exception as error:  # whatever it is, it is the answer
        return f"{model_type}: {type(error).__name__}: {error}; {tried()}"


def _compare(model: Any, ids: torch.Tensor) -> str | None:
    name = model.config.model_type
    whole = model(ids, use_cache=False).logits[0, TOKENS - 1 :]
    exact = SmartKVCache(model.config, budget=None, policy="full", tiers=(16,), window=16)
    worst = (_stepwise(model, ids, exact) - whole).abs().max().item()
    if not worst <= TOLERANCE:
        return f"{name}: logits differ by {worst:.2g} from the model's own where nothing is compressed; {tried()}"
    small = SmartKVCache(model.config, budget=BUDGET, policy="keydiff", window=16, min_tokens=0)
    finite = bool(_stepwise(model, ids, small).isfinite().all())
    report = small.report()
    if not finite or report.ratio > BUDGET or report.tokens_seen != ids.shape[1]:
        held = f"{report.total_bytes:,} of {int(BUDGET * report.full_bytes):,} bytes"
        logits = "finite" if finite else "not finite"
        return f"{name}: a budget of {BUDGET} gave {held} for {report.tokens_seen} tokens, logits {logits}; {tried()}"
    return None


def _stepwise(model: Any, ids: torch.Tensor, cache: SmartKVCache) -> torch.Tensor:
    """Logits (1 + STEPS, vocab) behind a prefill of TOKENS."""
    parts = ids.split([TOKENS] + [1] * STEPS, 1)
    return torch.cat([model(part, **cache_kwargs(cache)).logits[0, -1:] for part in parts])


def self_test() -> list[str]:
    """What is wrong, in a sentence for each supported model type that does not work here; empty: all is well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tiny tensors threads mostly wait for each other
    try:
        return [problem for problem in map(check_type, SUPPORTED) if problem is not None]
    finally:
        torch.set_num_threads(threads)
