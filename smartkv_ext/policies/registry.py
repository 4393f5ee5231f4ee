"""Policies by name, by file and by specification: the one way in for the cache, the command line and saved files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import Policy
from .options import check_options

POLICIES: dict[str, type[Policy]] = {}
SUFFIXES = (".json", ".yaml", ".yml")


def get_policy(policy: str | Policy | Mapping[str, Any], **options: Any) -> Policy:
    """An instance as it is; or a new one by name with its options, by specification (``Policy.spec``), or by file.

    A name that ends in .json, .yaml or .yml is a file: a specification, or a policy map (see ``PolicyMap``).

    Raises:
        ValueError: unknown name, a map that says nothing, or a file that is missing, damaged or says something that no
            policy understands.
        TypeError: anything else, or an option that the policy does not have or that has another type.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mapping):
        chosen = dict(policy)
        if not isinstance(chosen.get("name"), str):
            raise ValueError(f'a policy must be a name or {{"name": ..., option: ...}}; got {json.dumps(chosen)}')
        return get_policy(chosen.pop("name"), **chosen, **options)
    if not isinstance(policy, str):
        raise TypeError(f"policy must be a name or a Policy; got {type(policy).__name__}")
    if policy.endswith(SUFFIXES):
        return _build(_read(Path(policy)), policy, options)
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(sorted(POLICIES))}, or a JSON or YAML file; got {policy!r}")
    if policy == "map" and not options:
        raise ValueError(
            'policy "map" must say what it maps: name its file (--policy FILE.json or FILE.yaml), or give default, '
            "rules or shares"
        )
    return _made(POLICIES[policy], options)


def _made(kind: type[Policy], options: dict[str, Any]) -> Policy:
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    check_options(kind, options)
    return kind(**options)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"policy file {str(path)!r} does not exist")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text)
        import yaml  # type: ignore[import-untyped]  # a file of another kind needs no YAML

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error
    except ValueError as error:
        raise ValueError(f"policy file {str(path)!r} is not {path.suffix[1:].upper()}: {error}") from error


def _build(content: Any, path: str, options: dict[str, Any]) -> Policy:
    if not isinstance(content, dict):
        raise ValueError(f"policy file {path!r} must hold a mapping; got {type(content).__name__}")
    try:
        if "name" in content:
            return get_policy(content, **options)
        unknown = set(content) - {"default", "rules", "shares", "version"}
        if unknown:
            raise ValueError(
                f"must have a name, or default, rules, shares and version; got {sorted(map(str, unknown))}"
            )
        return _made(POLICIES["map"], {**content, **options})
    except (ValueError, TypeError) as error:
        raise ValueError(f"policy file {path!r}: {error}") from error
