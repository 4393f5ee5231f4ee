"""Tensor parallelism over two processes, and accelerate's dispatch to CPU and disk."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf.tiny import assert_same, generate, prompts, tiny
from hf.tp_worker import run

import smartkv_ext
from smartkv_ext import SmartKVCache


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_tensor_parallel_equals_one_process(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    expected = run(model, *prompts(3))
    worker = Path(__file__).with_name("tp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240)
    files = sorted(tmp_path.glob("rank*.pt"))
    assert len(files) == 2, process.stderr[-3000:]
    for file in files:
        saved = torch.load(file)
        assert saved["heads"] == {1}, "each rank must hold one of the two KV heads"
        for name, (sequences, logits) in expected.items():
            theirs, their_logits = saved["results"][name]
            assert torch.equal(sequences, theirs), name
            assert (logits - their_logits).abs().max() < 1e-3, name
    if process.returncode:  # seen without SmartKV too: a joinable thread at shutdown, after all results are written
        pytest.xfail(f"results are right, but the launcher exited with {process.returncode}: {process.stderr[-300:]}")


def test_accelerate_dispatch(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    reference_model = tiny("qwen2")
    ids, mask = prompts(2)
    arguments = dict(budget=0.5, policy="keydiff", tiers=(4, 8), window=24)
    with smartkv_ext.patch(reference_model):
        reference = generate(
            reference_model, ids, mask, SmartKVCache(reference_model.config, **arguments, min_tokens=0)
        )
    for patch_first in (True, False):
        model = tiny("qwen2")
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
        if patch_first:
            smartkv_ext.patch(model)
        model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        if not patch_first:
            smartkv_ext.patch(model)
        assert_same(
            reference, generate(model, ids, mask, SmartKVCache(model.config, **arguments, min_tokens=0)), atol=1e-5
        )
