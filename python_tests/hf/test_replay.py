"""Decode steps that are recorded once and replayed: the same calls with the same arguments, of which only the memory
has changed. A CUDA graph does that on a GPU, a tape of the dispatched calls here."""

import contextlib
import gc

import pytest
import torch
from gates.make_gates import usable
from hf.tape import Recorder, Tape
from hf.tiny import prompts, tiny
from torch._dynamo.testing import CompileCounterWithBackend

import smartkv_ext
from smartkv_ext import ReplayedDecoder, SmartKVCache
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.hf.replay import CudaGraphRecorder
from smartkv_ext.policies import POLICIES


def logits_of(model, cache, ids, prompt, position_ids=None):
    """Of the tokens behind the prompt, one forward each."""
    out = []
    for i in range(prompt, ids.shape[1]):
        at = None if position_ids is None else position_ids + i - prompt
        out.append(model(ids[:, i : i + 1], **cache_kwargs(cache), position_ids=at).logits[:, -1])
    return torch.stack(out, 1)


def test_a_frozen_number_shows():
    """The tape is what a graph is: a number of the host stays as it was."""
    x = torch.zeros(3)

    def step(slot):
        x[slot] += 1
        return x * 2

    with Tape() as tape:
        out = step(1)
    tape.replay()
    assert x.tolist() == [0, 2, 0] and out.tolist() == [0, 4, 0]


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"map"}))
def test_replayed_generation(name):
    """Logits and the state of the cache, over several packing steps, are those of ordinary steps."""
    model = tiny("qwen2", num_hidden_layers=2)
    ids, _ = prompts(1, 380)
    recorder = Recorder()
    with smartkv_ext.patch(model), torch.no_grad():
        caches = [
            SmartKVCache(model.config, budget=0.9, policy=usable(name, model), window=64, min_tokens=0)
            for _ in range(2)
        ]
        for cache in caches:
            model(ids[:, :300], **cache_kwargs(cache))
        expected = logits_of(model, caches[0], ids, 300)
        decoder = ReplayedDecoder(model, caches[1], record=recorder)
        got = torch.stack([decoder.step(ids[:, i : i + 1]).clone() for i in range(300, 380)], 1)
    assert torch.equal(got, expected)
    assert recorder.records <= 8 and recorder.replays >= 60
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        for owner, name in (("layer", "seen"), ("layer", "recent_count"), ("window", "used")):
            mine, other = (x if owner == "layer" else x.window for x in (ours, theirs))
            assert getattr(mine, name) == getattr(other, name)
        assert torch.equal(ours.window.held("k"), theirs.window.held("k"))
        assert torch.equal(ours.window.held_positions(), theirs.window.held_positions())
        assert torch.equal(ours.store.positions(), theirs.store.positions())
        assert torch.equal(ours.row_tokens, theirs.row_tokens)


@pytest.mark.parametrize("kind", ["qwen3_hybrid", "llama"])
def test_replayed_batch_with_padding(kind):
    model = tiny(kind)
    ids, mask = prompts(3, 230)
    prompt = 180
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with smartkv_ext.patch(model), torch.no_grad():
        caches = [SmartKVCache(model.config, budget=0.5, window=32, min_tokens=0) for _ in range(2)]
        for cache in caches:
            model(
                ids[:, :prompt], attention_mask=mask[:, :prompt], position_ids=positions[:, :prompt],
                **cache_kwargs(cache),
            )  # fmt: skip
        now = positions[:, prompt : prompt + 1]
        expected = logits_of(model, caches[0], ids, prompt, now)
        decoder = ReplayedDecoder(model, caches[1], now, Recorder())
        got = torch.stack([decoder.step(ids[:, i : i + 1]).clone() for i in range(prompt, 230)], 1)
    assert torch.equal(got, expected)


def test_refuses_an_empty_cache():
    model = tiny("qwen2", num_hidden_layers=1)
    with smartkv_ext.patch(model), pytest.raises(ValueError, match="must hold the prompt"):
        ReplayedDecoder(model, SmartKVCache(model.config, min_tokens=0))


def test_graphs_need_cuda():
    model = tiny("qwen2", num_hidden_layers=1)
    cache = SmartKVCache(model.config, min_tokens=0)
    with torch.no_grad(), smartkv_ext.patch(model):
        model(torch.ones(1, 4, dtype=torch.int64), **cache_kwargs(cache))
        with pytest.raises(ValueError, match=r"cache must be on a CUDA device: .* got cpu"):
            ReplayedDecoder(model, cache)


def decoder_behind(model, ids, steps, record=None):
    """(decoder, cache) that has seen 300 + ``steps`` tokens, with a step recorded."""
    cache = SmartKVCache(model.config, budget=0.9, policy="keydiff", window=64, min_tokens=0)
    model(ids[:, :300], **cache_kwargs(cache))
    decoder = ReplayedDecoder(model, cache, record=record or Recorder())
    for i in range(300, 300 + steps):
        decoder.step(ids[:, i : i + 1])
    return decoder, cache


@pytest.mark.parametrize(
    "write",
    [
        lambda model, cache, ids: cache.crop(-4),
        lambda model, cache, ids: cache.reset(),
        lambda model, cache, ids: cache.reorder_cache(torch.tensor([1, 0])),
        lambda model, cache, ids: model(ids[:, 306:307], **cache_kwargs(cache)),
    ],
    ids=("crop", "reset", "reorder", "forward"),
)
def test_refuses_a_cache_that_others_have_written_to(write):
    model = tiny("qwen2", num_hidden_layers=2)
    ids, _ = prompts(2, 320)
    with smartkv_ext.patch(model), torch.no_grad():
        decoder, cache = decoder_behind(model, ids, 6)
        write(model, cache, ids)
        with pytest.raises(RuntimeError, match="something else has written to the cache"):
            decoder.step(ids[:, 307:308])


def test_refuses_wrong_shapes():
    model = tiny("qwen2", num_hidden_layers=1)
    ids, _ = prompts(2, 320)
    with smartkv_ext.patch(model), torch.no_grad():
        decoder, cache = decoder_behind(model, ids, 1)
        with pytest.raises(ValueError, match=r"ids must be \(2, 1\); got \(1, 1\)"):
            decoder.step(ids[:1, 301:302])
        with pytest.raises(ValueError, match=r"position_ids must be \(2, 1\); got \(2,\)"):
            ReplayedDecoder(model, cache, torch.zeros(2), Recorder())


@pytest.mark.parametrize("outside, inside", [(True, True), (True, False), (False, True)])
def test_inference_mode_may_change(outside, inside):
    """Between the prompt, the decoder's making and its steps."""
    model = tiny("qwen2", num_hidden_layers=1)
    ids, _ = prompts(1, 310)
    with smartkv_ext.patch(model):
        with torch.inference_mode(outside), torch.no_grad():
            decoder, cache = decoder_behind(model, ids, 0)
        with torch.inference_mode(inside):
            got = [decoder.step(ids[:, i : i + 1]).clone() for i in range(300, 309)]
        with torch.no_grad():
            model(ids[:, 309:310], **cache_kwargs(cache))
            expected = logits_of(model, decoder_behind(model, ids, 0)[1], ids[:, :309], 300)
    assert torch.equal(torch.stack(got, 1), expected)


@contextlib.contextmanager
def broken(module, name):
    """A method that raises."""
    plain = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: 1 / 0)
    try:
        yield
    finally:
        setattr(module, name, plain)


class Failing(Recorder):
    """The first step that is recorded fails as a capture does: nothing of it has run."""

    def __init__(self, cache, *target):
        super().__init__()
        self.cache, self.target = cache, target

    def __call__(self, call):
        if self.target is None:
            return super().__call__(call)
        tensors = list(self.cache.clock._held.values())
        for layer in self.cache.layers:
            tensors += [*layer.window.tensors().values(), *layer.meter.sums.values()]
        before = [x.clone() for x in tensors]
        with broken(*self.target):
            self.target = None
            try:
                call()
            finally:
                for x, old in zip(tensors, before, strict=True):
                    x.copy_(old)


@pytest.mark.parametrize("policy", ["keydiff", "h2o"])
@pytest.mark.parametrize("part", ["mlp", "attention", "ordinary"])
def test_a_step_that_fails_is_taken_back(policy, part):
    """Of one that is recorded the device knows nothing, an ordinary one it must forget."""
    model = tiny("qwen2", num_hidden_layers=2)
    ids, _ = prompts(1, 320)
    with smartkv_ext.patch(model), torch.no_grad():
        caches = [SmartKVCache(model.config, budget=0.9, policy=policy, window=64, min_tokens=0) for _ in range(2)]
        for cache in caches:
            model(ids[:, :300], **cache_kwargs(cache))
        expected = logits_of(model, caches[0], ids, 300)
        target = (caches[1], "after_attention") if part == "attention" else (model.model.layers[1].mlp, "forward")
        decoder = ReplayedDecoder(model, caches[1], record=Failing(caches[1], *target))
        fails = broken(*target) if part == "ordinary" else contextlib.nullcontext()
        at = 300 if part == "ordinary" else 301  # the first step warms up
        got = [decoder.step(ids[:, i : i + 1]).clone() for i in range(300, at)]
        with fails, pytest.raises(ZeroDivisionError):
            decoder.step(ids[:, at : at + 1])
        assert [layer.seen for layer in caches[1].layers] == [at, at]
        decoder._record.target = None
        got += [decoder.step(ids[:, i : i + 1]).clone() for i in range(at, 320)]
    torch.testing.assert_close(torch.stack(got, 1), expected)


def test_refuses_a_cache_that_could_not_be_taken_back():
    """A sliding layer that has packed in the failing step lacks what the step before it saw."""
    model = tiny("mistral_sliding", num_hidden_layers=2)
    ids, _ = prompts(1, 320)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=0.9, policy="keydiff", window=64, min_tokens=0)
        model(ids[:, :200], **cache_kwargs(cache))
        decoder = ReplayedDecoder(model, cache, record=Recorder())
        at = 200
        while cache.step_kind() is not None:
            decoder.step(ids[:, at : at + 1])
            at += 1
        with broken(model.model.layers[1].mlp, "forward"), pytest.raises(RuntimeError, match="could not be restored"):
            decoder.step(ids[:, at : at + 1])
        with pytest.raises(RuntimeError, match="begin with a new ReplayedDecoder"):
            decoder.step(ids[:, at : at + 1])


def test_compiled_steps_are_not_compiled_anew():
    """The second step of a compiled model generalises, if anything; the ones behind it run what is there."""
    model = tiny("qwen2", num_hidden_layers=2)
    ids, _ = prompts(1, 190)
    counter = CompileCounterWithBackend("eager")
    with smartkv_ext.patch(model), torch.no_grad():
        caches = [SmartKVCache(model.config, budget=0.5, window=32, min_tokens=0) for _ in range(2)]
        for cache in caches:
            model(ids[:, :150], **cache_kwargs(cache))
        expected = logits_of(model, caches[0], ids, 150)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=counter)
        got, graphs = [], []
        for i in range(150, 190):
            at = torch.full((1, 1), i)
            got.append(compiled(ids[:, i : i + 1], **cache_kwargs(caches[1]), position_ids=at).logits[:, -1])
            graphs.append(counter.frame_count)
    torch.testing.assert_close(torch.stack(got, 1), expected)
    assert graphs[0] > 0
    assert graphs[2] == graphs[-1], graphs


@pytest.fixture
def streams(monkeypatch):
    """Names of what was called on torch.cuda, which does nothing else."""
    log = []

    class Graph:
        made = 0

        def __init__(self):
            Graph.made += 1
            self.id = Graph.made

        def pool(self):
            return 0, self.id

        def capture_begin(self, pool, capture_error_mode):
            assert capture_error_mode == "thread_local"
            log.append(f"begin in {pool[1]}")

        def capture_end(self):
            log.append("end")
            if "invalid" in log:
                log.remove("invalid")
                raise RuntimeError("operation failed due to a previous error during capture")

        def replay(self):
            log.append("replay")

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    @contextlib.contextmanager
    def entered(*args, **kwargs):
        yield

    @contextlib.contextmanager
    def device(index):
        log.append(f"on {index}")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    fakes = {
        "Stream": Stream, "current_stream": Stream, "stream": entered, "graph": entered, "device": device,
        "current_device": lambda: 1,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("endAllocateToPool", "releasePool"):
        monkeypatch.setattr(
            torch._C, f"_cuda_{name}", lambda index, pool, name=name: log.append(f"{name} {index} {pool[1]}")
        )
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: None)
    return log


def test_capture_ends_whatever_happens(streams):
    record = CudaGraphRecorder(torch.device("cuda:1"))
    assert streams == ["on cuda:1"]
    del streams[:]
    out, replay = record(lambda: streams.append(f"step, gc {gc.isenabled()}") or "logits")
    assert out == "logits" and gc.isenabled()
    assert streams == ["on cuda:1", "wait", "begin in 1", "step, gc False", "end", "wait", "replay"]
    replay()
    assert streams.pop() == "replay"
    del streams[:]
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0)
    assert streams == ["on cuda:1", "wait", "begin in 1", "end"] and gc.isenabled()


@pytest.mark.parametrize("raises", [False, True], ids=("end", "call"))
def test_a_capture_that_the_driver_gave_up_leaves_its_pool(streams, raises):
    """As after a call that waits for the device: torch would refuse the pool from then on."""
    record = CudaGraphRecorder(torch.device("cuda:1"))
    del streams[:]
    with pytest.raises(ZeroDivisionError if raises else RuntimeError):
        record(lambda: streams.append("invalid") or (1 / 0 if raises else "logits"))
    assert streams == ["on cuda:1", "wait", "begin in 1", "end", "endAllocateToPool 1 1", "releasePool 1 1"]
    assert gc.isenabled()
    del streams[:]
    assert record(lambda: "logits")[0] == "logits"
    assert streams == ["on cuda:1", "wait", "begin in 4", "end", "wait", "replay"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["keydiff", "h2o", "gate"])
def test_cuda_graphs(name):
    """Replayed as graphs on a GPU, with synchronisation forbidden meanwhile."""
    model = tiny("qwen2", num_hidden_layers=2)
    policy = usable(name, model)
    model, (ids, _) = model.to("cuda", torch.bfloat16), prompts(1, 380)
    ids = ids.to("cuda")
    with smartkv_ext.patch(model), torch.no_grad():
        caches = [SmartKVCache(model.config, budget=0.9, policy=policy, window=64, min_tokens=0) for _ in range(2)]
        for cache in caches:
            model(ids[:, :300], **cache_kwargs(cache))
        expected = logits_of(model, caches[0], ids, 300)
        decoder, got, kinds = ReplayedDecoder(model, caches[1]), [], []
        for i in range(300, 380):
            kinds.append(caches[1].step_kind())
            replays = kinds[-1] is not None and kinds[-3:] == [kinds[-1]] * 3
            torch.cuda.set_sync_debug_mode("error" if replays else "default")
            try:
                got.append(decoder.step(ids[:, i : i + 1]).clone())
            finally:
                torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(torch.stack(got, 1), expected)


@pytest.mark.gpu
def test_a_capture_that_waits_for_the_device_fails_alone():
    """The driver gives it up; the steps behind it are recorded again."""

    def waits(module, args, output):
        output.sum().item()

    model = tiny("qwen2", num_hidden_layers=2).to("cuda", torch.bfloat16)
    ids = prompts(1, 320)[0].to("cuda")
    with smartkv_ext.patch(model), torch.no_grad():
        recorder = CudaGraphRecorder(ids.device)
        decoder, cache = decoder_behind(model, ids, 1, recorder)
        hook = model.model.layers[1].mlp.register_forward_hook(waits)
        with pytest.raises(RuntimeError):
            decoder.step(ids[:, 301:302])
        hook.remove()
        assert cache.get_seq_length() == 301
        got = torch.stack([decoder.step(ids[:, i : i + 1]).clone() for i in range(301, 320)], 1)
        expected = logits_of(model, decoder_behind(model, ids, 1, recorder)[1], ids, 301)
    torch.testing.assert_close(got, expected)
