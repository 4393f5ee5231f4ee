"""Which key basis a cache uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smartkv_ext.gates import Gates, ModelFacts, find_shipped_gates
from smartkv_ext.policies import Policy


def find_key_basis(wanted: bool | str | Path, policy: Policy, config: Any) -> Gates | None:
    """The gates whose ``basis`` serves a model of this transformers config, None for none.

    wanted: True: the policy's, or those of the package, if they have one; False: none; a folder or hub id of gates.

    Raises ValueError for named gates of another model or without a basis, TypeError for anything else.
    """
    if not isinstance(wanted, (bool, str, Path)):
        raise TypeError(f"key_basis must be True, False, or a folder or hub id of gates; got {type(wanted).__name__}")
    facts = ModelFacts.from_config(config)
    if isinstance(wanted, bool):
        found = (policy.own_gates, find_shipped_gates(facts)) if wanted else ()
        return next((gates for gates in found if gates is not None and gates.basis is not None), None)
    gates = Gates.from_pretrained(wanted)
    gates.check_model(facts)
    if gates.basis is None:
        raise ValueError(f"key_basis {str(wanted)!r} has none: measure one with python -m training.key_basis")
    return gates
