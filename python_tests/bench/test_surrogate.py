"""The KVzap-style rival is trained as fairly as our gates."""

import json

import torch
from safetensors.torch import save_file

from bench.surrogate import linear_surrogate, mlp_surrogate, trained_surrogates


def test_surrogates_learn_what_is_there():
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(12, 2, generator=generator) / 12**0.5
    known, held_out = (torch.randn(n, 12, generator=generator) for n in (1500, 500))
    target, want = known @ direction, held_out @ direction
    bent = mlp_surrogate((known, target.abs()), (held_out, want.abs()), 60)
    with torch.no_grad():
        assert (linear_surrogate(known, target)(held_out) - want).square().mean() < 1e-3
        assert (bent(held_out) - want.abs()).square().mean() < 0.3 * want.abs().var()


def test_an_mlp_that_learns_by_heart_is_stopped_like_a_gate():
    generator = torch.Generator().manual_seed(0)
    noise = [(torch.randn(n, 32, generator=generator), torch.randn(n, 1, generator=generator)) for n in (64, 2000)]
    model = mlp_surrogate(*noise, 60)
    with torch.no_grad():
        losses = [(model(x) - y).square().mean().item() for x, y in noise]
    assert losses[1] < 1.15, "60 epochs without a look at the valid split end at 1.33"


def test_surrogates_of_all_layers_are_trained_once(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", 400), ("valid", 100)):
        hidden = 5 + 2 * torch.randn(3, 1, n, 12, generator=generator)  # layers
        target = hidden[..., 0].expand(3, 2, n) * torch.tensor([1.0, -2.0])[:, None] - 3  # heads
        index = torch.arange(n, dtype=torch.int32)
        tensors = {"hidden": hidden, "recon_sum": target.contiguous(), "positions": index, "pieces": index + 0}
        save_file(tensors, tmp_path / f"{split}-00000.safetensors")
    (tmp_path / "dataset.json").write_text(json.dumps({"recipe": {"length": 64}}))
    made = trained_surrogates(tmp_path, "recon_sum", 0, tmp_path / "work" / "linear.safetensors")
    assert made.r2 > 0.99 and made.num_parameters == 3 * 2 * 13
    want = torch.stack([hidden[1, 0, :, 0] - 3, -2 * hidden[1, 0, :, 0] - 3])
    torch.testing.assert_close(made.of_layer(1, hidden[1, 0]), want, rtol=0.05, atol=0.2)
    (tmp_path / "train-00000.safetensors").write_bytes((tmp_path / "valid-00000.safetensors").read_bytes())
    other = trained_surrogates(tmp_path, "recon_sum", 0, tmp_path / "work" / "linear.safetensors")
    assert not torch.equal(other.inputs, made.inputs), "another number of tokens: trained anew"
    again = trained_surrogates(tmp_path, "recon_sum", 0, tmp_path / "work" / "linear.safetensors")
    assert again.r2 == other.r2 and torch.equal(again.of_layer(2, hidden[2, 0]), other.of_layer(2, hidden[2, 0]))
