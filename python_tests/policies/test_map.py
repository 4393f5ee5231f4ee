"""Policy maps and adakv: who decides about which head, and what bad files are told."""

import json
import re

import pytest
import torch
from policies.views import make_records, make_view, valid

from smartkv_ext.policies import get_policy

RULES = [
    {"layers": "0-2", "policy": {"name": "streaming_llm", "recent": 8}, "share": 0},
    {"layers": [1], "heads": 1, "policy": "h2o"},
    {"layers": "3", "heads": "0", "policy": "knorm", "share": 3},
]


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_a_file_says_which_head_follows_which_policy(tmp_path, suffix):
    import yaml

    path = tmp_path / f"map{suffix}"
    content = {"version": 1, "default": "keydiff", "rules": RULES}
    path.write_text(json.dumps(content) if suffix == ".json" else yaml.safe_dump(content))
    policy = get_policy(str(path))
    names = [[policy.policy_of(layer, head).name for head in range(2)] for layer in range(4)]
    assert names == [["streaming_llm"] * 2, ["streaming_llm", "h2o"], ["streaming_llm"] * 2, ["knorm", "keydiff"]]
    assert [policy.layer_share(i, 4, 2) for i in range(4)] == [0, 4 / 5, 0, 16 / 5]
    assert policy == get_policy("map", **content) == get_policy(json.loads(json.dumps(policy.spec())))
    assert policy.accumulates and not policy.compares_heads and policy.recent_queries == 0


def test_scores_are_those_of_the_heads_policies():
    policy = get_policy("map", default="keydiff", rules=RULES)
    view = make_view()  # layer 1
    scores = policy.score(view)
    h2o, streaming = get_policy("h2o").score(view), get_policy("streaming_llm", recent=8).score(view)
    assert torch.equal(scores[:, 1], h2o[:, 1]) and torch.equal(scores[:, 0], streaming[:, 0])
    carried = policy.carried(scores, view.received, 1, 0)
    assert torch.equal(carried[:, 1], view.received[:, 1]) and torch.equal(carried[:, 0], scores[:, 0])
    # Under tensor parallelism the only local head may be the second of the model.
    assert torch.equal(policy.carried(scores[:, :1], view.received[:, :1], 1, 1), view.received[:, :1])
    records = make_records(layer_idx=1)
    fresh = policy.refresh(records)
    assert torch.equal(fresh[:, 1], records.received[:, 1])
    assert torch.equal(fresh[:, 0] == -torch.inf, records.positions[:, 0] < 52)


def test_what_a_policy_remembers_stays_its_own():
    rules = [{"heads": 0, "policy": "keydiff"}, {"heads": 1, "policy": {"name": "adakv", "base": "keydiff"}}]
    policy, alone = get_policy("map", default="knorm", rules=rules), get_policy("keydiff")
    view, plain = make_view(), make_view()
    for start in (0, 20):
        later = make_view(seed=start, start=start, state=view.state)
        expected = alone.score(make_view(seed=start, start=start, state=plain.state))
        assert torch.equal(policy.score(later)[valid(later)], expected[valid(later)])
    policy.crop(view.state, 7)
    alone.crop(plain.state, 7)
    assert {name.split(".")[1] for name in view.state} == set(plain.state)
    assert all(torch.equal(x, plain.state[name.split(".")[1]]) for name, x in view.state.items())


def test_heads_compete_only_where_they_can():
    streaming = {"name": "streaming_llm", "recent": 8}
    split = [{"heads": 0, "policy": streaming}]
    assert get_policy("map", default="snapkv", rules=split).compares_heads
    assert not get_policy("map", default="knorm", rules=split).compares_heads
    assert not get_policy("map", default="snapkv", rules=[{"heads": 1, "policy": "keydiff"}]).compares_heads


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "rule 1 must have a policy"),
        ({"policy": "snapkv", "layer": 3}, "rule 1 must have a policy and may have layers, heads, share; got ['layer'"),
        ({"policy": "magic"}, "rule 1: policy must be one of"),
        ({"policy": {"name": "snapkv", "kernel": 5}}, "rule 1: "),
        ({"policy": "snapkv", "layers": "first"}, 'rule 1: layers must be "*"'),
        ({"policy": "snapkv", "layers": -1}, 'rule 1: layers must be "*"'),
        ({"policy": "snapkv", "heads": []}, "rule 1: heads must name at least one"),
        ({"policy": "snapkv", "heads": "3-1"}, "rule 1: heads must name at least one"),
        ({"policy": "snapkv", "heads": "0-99999999999"}, "rule 1: heads must be below"),
        ({"policy": "snapkv", "share": -1}, "rule 1: share must be a number of at least 0; got -1"),
        ({"policy": "full"}, "may hold policies that evict, and no map; got 'full'"),
        ({"policy": {"name": "map", "default": "knorm"}}, "may hold policies that evict, and no map; got 'map'"),
        ("snapkv", "rule 1 must be a mapping; got 'snapkv'"),
    ],
)
def test_bad_rules_are_named(rule, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        get_policy("map", rules=[rule])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", None, "does not exist"),
        ("a.json", "{", "is not JSON"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "", "must hold a mapping; got NoneType"),
        ("a.json", "[1]", "must hold a mapping; got list"),
        ("a.json", '{"rule": []}', "must have a name, or default, rules, shares and version; got ['rule']"),
        ("a.json", '{"rules": "all"}', "rules must be a list; got str"),
        ("a.json", '{"version": 2}', "version must be 1; got 2"),
        ("a.json", '{"name": "evolved", "expression": "1 +"}', "cannot be read"),
        ("a.json", '{"name": "snapkv", "bananas": 1}', "bananas"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        get_policy(str(tmp_path / name))
    assert name in str(error.value)


def test_shares_of_layers_and_of_rules_are_multiplied():
    policy = get_policy("map", shares=[1, 2, 1], rules=[{"layers": 2, "heads": 0, "policy": "keydiff", "share": 0}])
    policy.check(3, 2)
    assert [policy.layer_share(i, 3, 2) for i in range(3)] == [6 / 7, 12 / 7, 3 / 7]
    assert get_policy(policy.spec()) == policy
    for shares in ([1, -1], "12", [True, 1]):
        with pytest.raises(ValueError, match="shares must be numbers of at least 0"):
            get_policy("map", shares=shares)


def test_a_map_must_fit_the_model():
    with pytest.raises(ValueError, match="shares must be 4 for this model; got 2"):
        get_policy("map", shares=[1, 2]).check(4, 2)
    with pytest.raises(ValueError, match="rule 1: layers must be below 4 for this model; got 7"):
        get_policy("map", rules=[{"layers": [0, 7], "policy": "knorm"}]).check(4, 2)
    with pytest.raises(ValueError, match="some head must have a share above 0"):
        get_policy("map", rules=[{"policy": "knorm", "share": 0}]).check(4, 2)


def test_adakv_takes_any_score():
    view = make_view()
    policy = get_policy("adakv", base={"name": "snapkv", "kernel_size": 3})
    assert torch.equal(policy.score(view), get_policy("snapkv", kernel_size=3).score(view))
    assert policy.compares_heads and policy.head_floor == 0.2 and policy.prefill_queries == 32
    assert get_policy("adakv", base="pyramidkv").layer_share(0, 2, 1) > 1
    assert get_policy("adakv", base="hybrid").accumulates
    for options, message in (
        ({"floor": 1.5}, "floor must lie in [0, 1]; got 1.5"), ({"base": "full"}, "base must be a policy that evicts"),
        ({"base": "magic"}, "policy must be one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            get_policy("adakv", **options)
