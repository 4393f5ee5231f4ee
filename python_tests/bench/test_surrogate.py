"""The KVzap-style rival is trained as fairly as our gates."""

import torch

from bench.surrogate import linear_surrogate, mlp_surrogate


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
