"""Options of policies, checked by what their dataclasses declare, so that all policies refuse alike."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from .base import Policy

_NUMBERS = {int: Integral, float: Real}  # NumPy's scalars are numbers too


def option_types(kind: type[Policy]) -> dict[str, Any]:
    """The options of a policy and their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.init}


def check_options(kind: type[Policy], options: Mapping[str, Any]) -> None:
    """Elements of sequences and values are for the policy itself to check.

    Raises TypeError naming the policy, the option, what came and what there is.
    """
    known = option_types(kind)
    listed = ", ".join(f"{name}: {_named(hint)}" for name, hint in known.items()) or "none"
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"policy {kind.name!r} has no option {name!r}; its options: {listed}")
        if not _fits(value, known[name]):
            raise TypeError(
                f"option {name!r} of policy {kind.name!r} must be {_named(known[name])}; "
                f"got {value!r} ({type(value).__name__}); its options: {listed}"
            )


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin in _NUMBERS:
        return isinstance(value, _NUMBERS[origin]) and not isinstance(value, bool)
    return isinstance(value, origin)


def _named(hint: Any) -> str:
    """ "a number or None"."""
    origin = typing.get_origin(hint) or hint
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_named(part) for part in typing.get_args(hint))
    words = {float: "number", types.NoneType: "None", Sequence: "list", Mapping: "mapping"}
    return str(words.get(origin, origin.__name__))
