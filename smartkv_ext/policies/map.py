"""map: another policy for each layer and head."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from smartkv_ext.gates import Gates

from .base import Policy, RecordView, TokenView
from .delegate import ASKS
from .position import StreamingLLM
from .registry import get_policy

EVERY = "*"
MOST = 10_000  # layers or heads
RULE_KEYS = ("layers", "heads", "policy", "share")
_SUMMED = ("prefill_queries", "decode_queries", "recent_queries", "shared_bytes")


@dataclass(frozen=True)
class _Rule:
    layers: frozenset[int] | None  # None: every
    heads: frozenset[int] | None
    policy: int  # index into PolicyMap._policies
    share: float

    def holds(self, layer: int, head: int) -> bool:
        return (self.layers is None or layer in self.layers) and (self.heads is None or head in self.heads)


@dataclass(frozen=True)
class PolicyMap(Policy):
    """Each (layer, KV head) follows the last rule that names it, or else ``default``.

    A rule is ``{"layers": ..., "heads": ..., "policy": ..., "share": ...}``. Layers and heads are "*" (the default), a
    number, a range "0-4" with both ends, or a list of those. A policy is a name or ``{"name": ..., option: ...}``.
    ``share`` (default 1) weighs the rule's heads where the budget is split over the layers; 0 for heads whose policy
    never packs a token. ``shares`` weighs whole layers, one number each (training/layer_shares.py measures them); both
    weights are multiplied.

    Heads of one layer compete for its bytes where all of them, streaming heads aside, follow one and the same policy
    and that compares heads; otherwise every head that keeps anything gets as much.

    DuoAttention's split (Xiao et al. 2024b) is such a map: streaming heads follow ``streaming_llm`` with ``recent``,
    retrieval heads any other policy. training/split_heads.py measures which heads are which.

    Raises ValueError naming the rule, what it says and what is accepted.
    """

    name: ClassVar[str] = "map"
    summary: ClassVar[str] = "another policy per layer and head: --policy FILE.json or FILE.yaml"
    source: ClassVar[str] = "Xiao et al. 2024, DuoAttention (for streaming and retrieval heads)"
    default: str | Policy | Mapping[str, Any] = "keydiff"
    rules: Sequence[Mapping[str, Any]] = ()
    shares: Sequence[float] = ()
    version: int = 1
    _policies: list[Policy] = field(init=False, compare=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.version != 1:
            raise ValueError(f"version must be 1; got {self.version!r}")
        if isinstance(self.rules, (str, Mapping)) or not isinstance(self.rules, Sequence):
            raise ValueError(f"rules must be a list; got {type(self.rules).__name__}")
        if isinstance(self.shares, str) or not all(_is_share(x) for x in self.shares):
            raise ValueError(f"shares must be numbers of at least 0, one per layer; got {self.shares!r}")
        object.__setattr__(self, "shares", tuple(map(float, self.shares)))
        default = get_policy(self.default)
        object.__setattr__(self, "default", default)
        object.__setattr__(self, "rules", tuple(_plain(rule) for rule in self.rules))
        self._policies.append(default)
        parsed = self._rules  # reads them, and complains
        used = [self._policies[i] for i in {0, *(rule.policy for rule in parsed)}]
        for policy in used:
            if not policy.evicts or isinstance(policy, PolicyMap):
                raise ValueError(f"a map may hold policies that evict, and no map; got {policy.name!r}")
        if len({getattr(policy, "gates", None) for policy in used if policy.scores_keys}) > 1:
            raise ValueError("the gates of a map must all be the same")
        for name in ASKS:
            values = [getattr(policy, name) for policy in used]
            object.__setattr__(self, name, max(values) if name in _SUMMED else any(values))
        keeping = {json.dumps(p.spec(), sort_keys=True): p for p in used if not _streams(p)}
        object.__setattr__(
            self, "compares_heads", len(keeping) == 1 and all(p.compares_heads for p in keeping.values())
        )
        object.__setattr__(self, "head_floor", max(p.head_floor for p in used))

    @cached_property
    def _rules(self) -> list[_Rule]:
        return [self._rule(number, rule) for number, rule in enumerate(self.rules, 1)]

    def _rule(self, number: int, rule: Any) -> _Rule:
        where = f"rule {number}"
        if not isinstance(rule, Mapping):
            raise ValueError(f"{where} must be a mapping; got {rule!r}")
        unknown = set(rule) - set(RULE_KEYS)
        if unknown or "policy" not in rule:
            raise ValueError(f"{where} must have a policy and may have layers, heads, share; got {sorted(rule)}")
        share = rule.get("share", 1)
        if not _is_share(share):
            raise ValueError(f"{where}: share must be a number of at least 0; got {share!r}")
        try:
            policy = get_policy(rule["policy"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
        if policy not in self._policies:
            self._policies.append(policy)
        layers, heads = (_numbers(rule.get(key, EVERY), f"{where}: {key}") for key in ("layers", "heads"))
        return _Rule(layers, heads, self._policies.index(policy), float(share))

    def _of(self, layer: int, head: int) -> tuple[int, float]:
        """Index of the policy of a head, and the head's share."""
        for rule in reversed(self._rules):
            if rule.holds(layer, head):
                return rule.policy, rule.share
        return 0, 1.0

    def policy_of(self, layer: int, head: int) -> Policy:
        """The policy that a head of a layer follows."""
        return self._policies[self._of(layer, head)[0]]

    # -- Policy ----------------------------------------------------------------------------------------------------

    def check(self, num_layers: int, num_kv_heads: int) -> None:
        for number, rule in enumerate(self._rules, 1):
            for key, numbers, limit in (("layers", rule.layers, num_layers), ("heads", rule.heads, num_kv_heads)):
                if numbers is not None and max(numbers) >= limit:
                    raise ValueError(
                        f"policy map, rule {number}: {key} must be below {limit} for this model; got {max(numbers)}"
                    )
        if self.shares and len(self.shares) != num_layers:
            raise ValueError(f"policy map: shares must be {num_layers} for this model; got {len(self.shares)}")
        if not any(self._weight(i, num_kv_heads) for i in range(num_layers)):
            raise ValueError("policy map: some head must have a share above 0; all have 0")

    @property
    def own_gates(self) -> Gates | None:
        return next((policy.own_gates for policy in self._policies if policy.own_gates), None)

    def for_model(self, config: Any) -> PolicyMap:
        made = replace(self)
        made._policies[:] = [policy.for_model(config) for policy in made._policies]
        object.__setattr__(made, "shared_bytes", max(policy.shared_bytes for policy in made._policies))
        return made

    def check_keys(self, sketch: Callable[[], torch.Tensor | None]) -> None:
        for policy in self._policies:
            policy.check_keys(sketch)

    def score_keys(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], first_layer: int, head_offset: int
    ) -> torch.Tensor:
        return next(p for p in self._policies if p.scores_keys).score_keys(keys, values, first_layer, head_offset)

    def layer_share(self, layer_idx: int, num_layers: int, num_kv_heads: int) -> float:
        weights = [self._weight(i, num_kv_heads) for i in range(num_layers)]
        return weights[layer_idx] * num_layers / sum(weights)

    def _weight(self, layer: int, num_kv_heads: int) -> float:
        of_heads = sum(self._of(layer, h)[1] for h in range(num_kv_heads))
        return of_heads * (self.shares[layer] if self.shares else 1.0)

    def score(self, view: TokenView) -> torch.Tensor:
        out = torch.zeros(view.keys.shape[:3], dtype=torch.float32, device=view.keys.device)
        for index, heads in self._heads(view.layer_idx, view.head_offset, out.shape[1]).items():
            mine = replace(view, state=_part(view.state, index))
            out[:, heads] = self._policies[index].score(mine)[:, heads]
            view.state.update({f"{index}.{name}": x for name, x in mine.state.items()})
        return out

    def refresh(self, records: RecordView) -> torch.Tensor:
        out = records.stored.clone()
        for index, heads in self._heads(records.layer_idx, records.head_offset, out.shape[1]).items():
            mine = replace(records, state=_part(records.state, index))
            out[:, heads] = self._policies[index].refresh(mine)[:, heads]
        return out

    def carried(
        self, scores: torch.Tensor, received: torch.Tensor | None, layer_idx: int, head_offset: int,
        key_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        out = scores.clone()
        for index, heads in self._heads(layer_idx, head_offset, out.shape[1]).items():
            kept = self._policies[index].carried(scores, received, layer_idx, head_offset, key_scores)
            out[:, heads] = kept[:, heads]
        return out

    def crop(self, state: dict[str, torch.Tensor], length: int) -> None:
        for index, policy in enumerate(self._policies):
            mine = _part(state, index)
            policy.crop(mine, length)
            state.update({f"{index}.{name}": x for name, x in mine.items()})

    def _heads(self, layer: int, offset: int, count: int) -> dict[int, list[int]]:
        """Local heads of each policy that this layer uses."""
        found: dict[int, list[int]] = {}
        for head in range(count):
            found.setdefault(self._of(layer, offset + head)[0], []).append(head)
        return found


def _is_share(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < 1e6


def _plain(rule: Any) -> Any:
    """The rule with its policy as a specification, as a file can hold it."""
    if isinstance(rule, Mapping) and isinstance(rule.get("policy"), Policy):
        return {**rule, "policy": rule["policy"].spec()}
    return rule


def _streams(policy: Policy) -> bool:
    """True for a policy that keeps no more than a few recent tokens."""
    return isinstance(policy, StreamingLLM) and policy.recent is not None


def _part(state: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """What policy ``index`` remembers."""
    prefix = f"{index}."
    return {name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)}


def _numbers(said: Any, where: str) -> frozenset[int] | None:
    """ "*", 3, "0-4", [0, "2-3"] -> the numbers; None: all."""
    if said == EVERY:
        return None
    found: set[int] = set()
    for item in said if isinstance(said, (list, tuple)) else [said]:
        first, dash, last = item.partition("-") if isinstance(item, str) else (str(item), "", "")
        if isinstance(item, bool) or not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise ValueError(f'{where} must be "*", a number from 0, a range like "0-4", or a list; got {said!r}')
        if int(last or first) >= MOST:
            raise ValueError(f"{where} must be below {MOST}; got {said!r}")
        found.update(range(int(first), int(last or first) + 1))
    if not found:
        raise ValueError(f"{where} must name at least one; got {said!r}")
    return frozenset(found)
