"""The basis in which a cache holds keys: scores and decisions stay as they are, quantised keys lose less."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.oracle import Oracle
from python_tests.gates.make_gates import random_gates, usable
from python_tests.hf.tiny import prompts, tiny
from smartkv_ext import SmartKVCache, patch
from smartkv_ext.eval.recording import LayerRecording, record
from smartkv_ext.gates import Gates, KeyBasis, ModelFacts, find_shipped_gates, lookup
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.hf.gate_check import sketch_of
from smartkv_ext.policies import POLICIES
from smartkv_ext.reference.hadamard import rotate
from smartkv_ext.reference.quantizer import K_FIT, decode, encode
from training.key_basis import fit
from training.layer_shares import layer_losses


def qwen(**options):
    return tiny("qwen2", vocab_size=400, **options)


def random_basis(layers=4, heads=2, head_dim=64, seed=0):
    """Matrices of condition 3 or so, far from any rotation, and centres as large as keys."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(layers, heads, head_dim, head_dim, generator=generator) * 0.5 * head_dim**-0.5
    centre = torch.randn(layers, heads, 1, head_dim, generator=generator)
    return torch.cat([torch.eye(head_dim) + noise, centre], 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gates of tiny("qwen2") that have a basis."""
    model, path = qwen(), tmp_path_factory.mktemp("gates")
    facts = ModelFacts.from_config(model.config)
    random_gates(facts, sketch=sketch_of(model), key_basis=random_basis()).save_pretrained(path)
    return path


def decoded(model, key_basis, **arguments):
    """Logits of a prefill, of tokens in ones and fours, and the cache. No token comes twice: keys would tie."""
    ids = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(0))[None, :300]
    cache = SmartKVCache(model.config, window=32, key_basis=key_basis, **arguments, min_tokens=0)
    with torch.no_grad(), patch(model):
        pieces = [model(x, **cache_kwargs(cache)).logits for x in ids.split([200, *[1] * 60, *[4] * 10], 1)]
    return torch.cat(pieces, 1), cache


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"map", "auto", "gate_hybrid", "full"}))
def test_every_policy_decides_as_without_it(policy, folder):
    model = qwen()
    arguments = {"policy": usable(policy, model), "tiers": (16,), "budget": "1MB"}
    want, plain = decoded(model, False, **arguments)
    found, held = decoded(model, folder, **arguments)
    assert held.smartkv_config.key_basis is not None and plain.smartkv_config.key_basis is None
    assert sum(int(layer.store.cache_seqlens.sum()) for layer in plain.layers) > 0
    for a, b in zip(held.layers, plain.layers, strict=True):
        assert torch.equal(a.store.positions(), b.store.positions())
        assert not torch.allclose(a.window.held("k"), b.window.held("k"), atol=0.1)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-4)


def test_report_counts_it_beside_the_cache(folder):
    model = qwen()
    _, plain = decoded(model, False, policy="keydiff", budget=0.5)
    _, held = decoded(model, folder, policy="keydiff", budget=0.5)
    # Turns and weights of channels are measured in either basis, and paid from the same budget.
    assert held.report().total_bytes == pytest.approx(plain.report().total_bytes, rel=0.01)
    assert plain.report().shared_bytes == 0
    assert held.report().shared_bytes == held.report().key_basis_bytes == held.smartkv_config.key_basis.num_bytes
    assert "key basis, shared" in str(held.report()) and "gate weights" not in str(held.report())
    assert held.smartkv_config.key_basis.num_bytes == 4 * 4 * 2 * (3 * 64 * 64 + 64)


def test_saved_caches_keep_their_basis(folder, tmp_path):
    model = qwen()
    _, cache = decoded(model, folder, policy="keydiff", budget=0.5)
    cache.save(tmp_path / "cache.safetensors")
    loaded = SmartKVCache.load(tmp_path / "cache.safetensors", model.config)
    more, _ = prompts(1, 8)
    with torch.no_grad(), patch(model):
        want, ours = (model(more, **cache_kwargs(x)).logits for x in (copy.deepcopy(cache), loaded))
    assert torch.equal(ours, want)
    assert torch.equal(loaded.smartkv_config.key_basis.packed, cache.smartkv_config.key_basis.packed)


@pytest.fixture
def shipped(folder, monkeypatch):
    """The gates come with the package."""
    monkeypatch.setattr(lookup, "_folders", lambda: [folder])
    find_shipped_gates.cache_clear()
    yield
    find_shipped_gates.cache_clear()


def test_the_packages_own_is_taken_for_its_model_alone(folder, shipped):
    model, other = qwen(), qwen(seed=5)
    assert decoded(model, True, policy="keydiff", budget=0.5)[1].smartkv_config.key_basis is not None
    cache = decoded(other, True, policy="keydiff", budget=0.5)[1]
    assert cache.smartkv_config.key_basis is None and cache.layers[2].config.key_basis is None
    llama = tiny("llama", vocab_size=400, num_key_value_heads=4)
    assert decoded(llama, True, policy="keydiff", budget=0.5)[1].smartkv_config.key_basis is None
    with pytest.raises(ValueError, match="belong to another model of the same shape"):
        decoded(other, folder, policy="keydiff", budget=0.5)


def test_loaded_caches_share_the_packages_own(shipped, tmp_path):
    model, other = qwen(), qwen(seed=5)
    _, cache = decoded(model, True, policy="keydiff", budget=0.5)
    cache.save(tmp_path / "cache.safetensors")
    loaded = SmartKVCache.load(tmp_path / "cache.safetensors", model.config)
    assert loaded.smartkv_config.key_basis is cache.smartkv_config.key_basis
    loaded.reset()
    with torch.no_grad(), patch(other):
        other(prompts(1, 100)[0], **cache_kwargs(loaded))
    assert loaded.smartkv_config.key_basis is None, "it is another model's"


@pytest.mark.parametrize("policy", ["auto", "keydiff"])
def test_measured_layers_of_another_model_go_without_it(policy, shipped):
    model = qwen(seed=5)
    ids = prompts(1, 200)[0]
    with patch(model):
        recording = record(model, ids[:, :180])
        found, want = (
            layer_losses(model, None, recording, ids[:, 180:], budget=0.25, policy=policy, key_basis=x)
            for x in (True, False)
        )
    assert torch.equal(found, want)


def test_the_oracle_of_another_model_goes_without_it(shipped):
    model, ids = qwen(seed=5), prompts(1, 60)[0]
    oracle = Oracle("oracle", {}, {tuple(ids[0, :40].tolist()): ids[:, 40:]})
    with patch(model), torch.no_grad():
        cache = oracle.prefill(model, record(model, ids[:, :40]))
    assert cache.smartkv_config.key_basis is None


@pytest.mark.parametrize("change", [lambda x: x[:3], lambda x: x[:, :1], lambda x: x[:, :, :33, :32], torch.zeros_like])
def test_cache_files_with_another_basis_are_refused(change, folder, tmp_path):
    model, path = qwen(), tmp_path / "cache.safetensors"
    decoded(model, folder, policy="keydiff", budget=0.5)[1].save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"key_basis": change(tensors["key_basis"]).contiguous()}, path, metadata)
    with pytest.raises(ValueError, match="is damaged: key_basis must"):
        SmartKVCache.load(path, model.config)


@pytest.mark.parametrize("name", ["gate", "auto", "union", "map", "evolved"])
def test_gates_of_a_policy_bring_theirs(name, folder):
    model = qwen()
    spec = {"gate": {}, "auto": {}, "union": {"parts": [{"name": "gate", "gates": str(folder)}, "keydiff"]},
            "map": {"default": {"name": "gate", "gates": str(folder)}},
            "evolved": {"expression": "gate + recent"}}[name]  # fmt: skip
    if name in ("gate", "auto", "evolved"):
        spec["gates"] = str(folder)
    cache = SmartKVCache(model.config, policy={"name": name, **spec}, min_tokens=0)
    assert torch.equal(cache.smartkv_config.key_basis.packed, random_basis().half())
    assert (
        SmartKVCache(
            model.config, policy={"name": name, **spec}, key_basis=False, min_tokens=0
        ).smartkv_config.key_basis
        is None
    )


def test_wrong_arguments_are_named(folder, tmp_path):
    model = qwen()
    with pytest.raises(TypeError, match="key_basis must be True, False, or a folder or hub id of gates; got int"):
        SmartKVCache(model.config, key_basis=1, min_tokens=0)
    with pytest.raises(ValueError, match="does not exist"):
        SmartKVCache(model.config, key_basis=tmp_path / "nowhere", min_tokens=0)
    with pytest.raises(ValueError, match="belong to another model: this one has num_layers 3, not 4"):
        SmartKVCache(qwen(num_hidden_layers=3).config, key_basis=folder, min_tokens=0)
    random_gates(ModelFacts.from_config(model.config)).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="has none: measure one"):
        SmartKVCache(model.config, key_basis=str(tmp_path / "none"), min_tokens=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda x: x[:, :, 1:], "head_dim"), (lambda x: x[:3], r"key_basis must be \(4, 2, 65, 64\)"),
     (lambda x: x.clone().fill_(torch.nan), "finite"), (lambda x: torch.zeros_like(x), "condition"),
     (lambda x: x * 1e6, "finite")],
)  # fmt: skip
def test_damaged_bases_are_refused(change, message):
    facts = ModelFacts.from_config(qwen().config)
    with pytest.raises(ValueError, match=message):
        random_gates(facts, key_basis=change(random_basis()))


def test_gate_files_keep_it(folder):
    assert torch.equal(Gates.from_pretrained(folder).key_basis, random_basis().half())


def uneven(num_heads, num_kv_heads, n, head_dim, seed=0):
    """Queries that are large where keys are small, as after a rotation of both; keys with a large mean."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, n, head_dim, generator=generator) for h in (num_heads, num_kv_heads, num_kv_heads))
    size = torch.logspace(-1, 1, head_dim)
    turn = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))[0]
    return LayerRecording(q=q * size @ turn, k=k / size @ turn + 5, v=v, pre_rope=k)


def test_fitted_bases_move_noise_away_from_queries():
    learned, other = uneven(4, 2, 2048, 64), uneven(4, 2, 256, 64, seed=1)
    other = LayerRecording(q=learned.q[:, :, :256] * 0.7, k=learned.k[:, :, :256], v=other.v, pre_rope=other.k)
    basis = fit([[learned]]).of_layer(0, torch.device("cpu"), 0, 2)

    def noise(k, q):
        """Of scores, with the keys through the codes of 3 bits."""
        mean = k.mean(2, keepdim=True)
        codes, scale = encode(rotate(k - mean), 3, "gaussian", K_FIT)
        back = rotate(decode(codes, scale, 3, "gaussian"), inverse=True) + mean
        return (q.unflatten(1, (2, 2)) @ (back - k)[:, :, None].mT).norm()

    plain, ours = noise(other.k, other.q), noise(basis.keys(other.k), basis.queries(other.q))
    assert ours < 0.4 * plain
    whole = fit([[learned]], 1.0).of_layer(0, torch.device("cpu"), 0, 2)
    assert noise(whole.keys(other.k), whole.queries(other.q)) < 0.7 * ours  # the same text: the whole map is best


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("dead", ["keys", "queries", "both", "one query head"])
def test_heads_that_do_nothing_get_a_basis_too(dead, strength):
    """Head 0 alone; the other one gets what it gets anyway."""
    x = uneven(4, 2, 256, 64)
    q, k = x.q.clone(), x.k.clone()
    if dead in ("keys", "both"):
        k[:, 0] = 3.0
    q[:, : {"keys": 0, "one query head": 1}.get(dead, 2)] = 0.0
    found = fit([[LayerRecording(q, k, x.v, x.pre_rope)]], strength).packed
    assert torch.equal(found[:, 1], fit([[x]], strength).packed[:, 1])
    assert torch.linalg.det(found[:, 0, :-1].double()).sub(1).abs() < 0.05


def test_large_centres_cost_no_precision():
    """Centres of the first layer of Qwen2.5 reach 350, keys vary by 1 around them."""
    packed = random_basis(1)
    packed[:, :, -1] *= 1e4
    basis, exact = KeyBasis(packed).of_layer(0, torch.device("cpu"), 0, 2), packed.half().double()[0]
    k = exact[None, :, -1:].float() + torch.randn(1, 2, 50, 64, generator=torch.Generator().manual_seed(0))
    want = (k.double() - exact[:, -1:]) @ exact[:, :-1].mT
    torch.testing.assert_close(basis.keys(k).double(), want, rtol=0, atol=2e-5)


def test_what_was_made_in_inference_mode_serves_outside():
    """One basis per process: autograd may meet it later."""
    with torch.inference_mode():
        basis = KeyBasis(random_basis(1)).of_layer(0, torch.device("cpu"), 0, 2)
    q = torch.randn(1, 4, 3, 64, requires_grad=True)
    basis.model_lse(torch.zeros(1, 4, 3), q, 1.0).sum().backward()
    assert q.grad is not None


def test_a_rank_holds_the_basis_of_its_heads():
    """Tensor parallel: KV heads from the first on."""
    basis, x = KeyBasis(random_basis(2)), uneven(4, 2, 8, 64)
    whole, part = (basis.of_layer(1, torch.device("cpu"), *heads) for heads in ((0, 2), (1, 1)))
    torch.testing.assert_close(part.keys(x.k[:, 1:]), whole.keys(x.k)[:, 1:])
    torch.testing.assert_close(part.queries(x.q[:, 2:]), whole.queries(x.q)[:, 2:])
    zero = torch.zeros(1, 4, 8)
    torch.testing.assert_close(part.model_lse(zero[:, 2:], x.q[:, 2:], 1.0), whole.model_lse(zero, x.q, 1.0)[:, 2:])


def test_scores_lose_the_same_for_all_keys():
    x = uneven(4, 2, 40, 64)
    basis = KeyBasis(random_basis(1)).of_layer(0, torch.device("cpu"), 0, 2)
    q, k = x.q.double(), x.k.double()
    truth = q.unflatten(1, (2, 2)) @ k[:, :, None].mT
    mapped = basis.queries(x.q).double().unflatten(1, (2, 2)) @ basis.keys(x.k).double()[:, :, None].mT
    gone = truth - mapped
    torch.testing.assert_close(gone, gone[..., :1].expand_as(gone), rtol=0, atol=1e-3)
    lse = basis.model_lse(mapped.logsumexp(-1).flatten(1, 2).float(), x.q, 1.0)
    torch.testing.assert_close(lse.double(), truth.logsumexp(-1).flatten(1, 2), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(basis.model_keys(basis.keys(x.k)), x.k, rtol=1e-5, atol=1e-4)
