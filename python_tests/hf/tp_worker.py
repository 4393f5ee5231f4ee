"""One rank of the tensor-parallel test: python -m torch.distributed.run --nproc-per-node 2 tp_worker.py FOLDER KIND."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from hf.tiny import generate, prompts

import smartkv_ext
from smartkv_ext import SmartKVCache

CACHES = {
    "exact": dict(budget=None, policy="full", tiers=(16,), window=16),
    "compressed": dict(budget=0.5, policy="random", tiers=(4, 8), window=24),
}


def run(model, ids, mask):
    results = {"plain": generate(model, ids, mask, new=20)}
    with smartkv_ext.patch(model):
        for name, arguments in CACHES.items():
            results[name] = generate(model, ids, mask, SmartKVCache(model.config, **arguments, min_tokens=0), new=20)
    return {name: (out.sequences, torch.stack(out.logits)) for name, out in results.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    results = run(model, *prompts(3))
    heads = {layer.self_attn.k_proj.weight.to_local().shape[0] // 64 for layer in model.model.layers}
    torch.save({"heads": heads, "results": results}, folder / f"rank{rank}.pt")  # judged even if the shutdown fails
    dist.destroy_process_group()
