"""Random gates for tiny models."""

import itertools

import torch

from smartkv_ext.gates import Gates, ModelFacts
from smartkv_ext.policies import get_policy


def facts(layers=4, kv_heads=2, head_dim=64, **changes):
    shape = dict(
        num_layers=layers, num_heads=4, num_kv_heads=kv_heads, head_dim=head_dim, hidden_size=256, intermediate_size=96,
        vocab_size=98, rope_theta=10000.0,
    )  # fmt: skip
    return ModelFacts(**(shape | changes))


def random_gates(model=None, hidden=(16,), seed=0, inputs="key", **options):
    model = model or facts()
    generator = torch.Generator().manual_seed(seed)
    width = model.head_dim * (2 if inputs == "key_value" else 1)
    stack = (model.num_layers, model.num_kv_heads)
    weights = [
        torch.randn(*stack, o, i, generator=generator) * i**-0.5 for i, o in itertools.pairwise((width, *hidden, 1))
    ]
    biases = [torch.randn(*stack, w.shape[2], generator=generator) for w in weights]
    return Gates([w.bfloat16().float() for w in weights], biases, model, inputs=inputs, **options)


def usable(spec, model, folder=None):
    """A policy for a tiny model; one that needs gates gets random ones, which can be saved in a folder."""
    if "gate" not in str(spec):
        return get_policy(spec)
    gates = random_gates(ModelFacts.from_config(model.config))
    if folder is not None:
        gates.save_pretrained(folder)
        gates = str(folder)
    return get_policy(spec, gates=gates, **({"local_layers": 1} if spec == "gate_hybrid" else {}))
