"""Models by name, and the embedded one: what is refused, and that nothing half-made is left behind."""

import importlib.machinery
import json

import pytest
import torch
from cli_runner import ask
from transformers import LlamaConfig, LlamaForCausalLM

from smartkv_ext.cli import models, smollm2
from smartkv_ext.cli.errors import CliError


def found_only(*names):
    """A find_spec that knows no other packages than these."""
    return lambda name: importlib.machinery.ModuleSpec(name, None) if name in names else None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, gguf installed, and no copy of the model's package."""
    monkeypatch.setenv("SMARTKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", found_only("gguf"))
    return tmp_path / "cache"


def make_folder(gguf, out):
    out.mkdir()
    (out / "config.json").write_text("{}")


def test_model_folders_are_checked(folder, document, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((folder / "config.json").read_bytes())
    for name, code, words in (
        (tmp_path / "missing", 2, "does not exist"),
        (tmp_path / "empty", 2, "has no config.json"),
        (document, 2, "is a file"),
        (tmp_path / "gpt", 2, "is of type 'gpt2'; supported are llama, mistral, qwen2, qwen3"),
        (tmp_path / "half", 1, "cannot load the model in"),
    ):
        done = ask(name, document)
        assert done.exit_code == code and words in " ".join(done.stderr.split()), done.output


def test_tokenizer_is_taken_as_it_stands(folder):
    """AutoTokenizer would give a Qwen2 model folder the splitting rules of Qwen2."""
    _, tokenizer = models.load_model(str(folder))
    assert "Split" not in str(tokenizer.backend_tokenizer.pre_tokenizer)


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(folder, name, dtype):
    model, _ = models.load_model(str(folder), name)
    assert model.dtype == dtype and not model.training


def test_without_gguf(cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", found_only())
    with pytest.raises(CliError, match="pip install gguf"):
        models.embedded_folder()
    assert not cache.exists()


def test_failed_download(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CliError, match="needs the network once"):
        models.embedded_folder()
    assert list(cache.iterdir()) == []


def test_unwritable_cache_folder(cache):
    cache.write_text("in the way")
    with pytest.raises(CliError, match="set SMARTKV_CACHE_DIR"):
        models.embedded_folder()


@pytest.mark.parametrize("failure", [CliError("it failed"), KeyboardInterrupt(), OSError(28, "no space left")])
def test_failed_conversion_leaves_nothing(cache, monkeypatch, failure):
    def convert(gguf, out):
        make_folder(gguf, out)
        raise failure

    monkeypatch.setattr(smollm2, "find_gguf", lambda tmp, status: tmp / "x.gguf")
    monkeypatch.setattr(smollm2, "convert", convert)
    with pytest.raises((CliError, KeyboardInterrupt)):
        models.embedded_folder()
    assert list(cache.iterdir()) == []


def test_conversion_happens_once(cache, monkeypatch):
    calls = []
    monkeypatch.setattr(smollm2, "find_gguf", lambda tmp, status: tmp / "x.gguf")
    monkeypatch.setattr(smollm2, "convert", lambda gguf, out: (calls.append(out), make_folder(gguf, out)))
    assert models.embedded_folder() == models.embedded_folder() == cache / smollm2.FOLDER
    assert len(calls) == 1
    assert list(cache.iterdir()) == [cache / smollm2.FOLDER]


def test_a_faster_process_wins(cache, monkeypatch):
    def convert(gguf, out):
        make_folder(gguf, out)
        make_folder(gguf, cache / smollm2.FOLDER)
        (cache / smollm2.FOLDER / "theirs").touch()

    monkeypatch.setattr(smollm2, "find_gguf", lambda tmp, status: tmp / "x.gguf")
    monkeypatch.setattr(smollm2, "convert", convert)
    assert (models.embedded_folder() / "theirs").exists()


def test_foreign_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CliError, match="is not the expected file"):
        smollm2.check_digest(tmp_path / "x.gguf")


def test_llama_as_qwen2_computes_the_same():
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    llama, ids = LlamaForCausalLM(config).eval(), torch.arange(20)[None]
    assert torch.equal(llama(ids).logits, smollm2.as_qwen2(llama)(ids).logits)
    llama.model.layers[0].mlp.more = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weights do not match"):
        smollm2.as_qwen2(llama)


@pytest.mark.slow
def test_the_embedded_model_splits_like_smollm():
    _, tokenizer = models.load_model("smollm2")
    assert tokenizer.tokenize("in 7421\n\nx") == ["in", "Ġ", "7", "4", "2", "1", "Ċ", "Ċ", "x"]
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
