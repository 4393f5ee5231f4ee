"""Expressions: arithmetic is Python's, is total, and nothing else can be said."""

import math

import pytest
import torch

from smartkv_ext.policies.expression import Expression

NAMES = ("x", "y")


@pytest.mark.parametrize(
    "text",
    ["x + 2 * y", "-(x - y) / 3", "min(x, y) - max(x, 0.5)", "x ** 0.25 * log(y)", "exp(-x) + sqrt(y)", "abs(x - y)"],
)
def test_values_are_pythons(text):
    x, y = torch.tensor([0.5, 1.5, 2.0]), torch.tensor([1.0, 0.25, 3.0])
    functions = dict(log=math.log, exp=math.exp, sqrt=math.sqrt, min=min, max=max, abs=abs)
    expected = [eval(text, functions | {"x": a, "y": b}) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    torch.testing.assert_close(Expression(text, NAMES)({"x": x, "y": y}), torch.tensor(expected))


@pytest.mark.parametrize("text", ["x / y", "log(x)", "sqrt(x)", "x ** y", "y ** x", "exp(1000 * y)", "x / (y - y)"])
def test_every_operation_is_total(text):
    x, y = torch.tensor([-2.0, 0.0, 1e6]), torch.tensor([0.0, -1.0, 50.0])
    assert torch.isfinite(Expression(text, NAMES)({"x": x, "y": y})).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x +", "cannot be read"),
        ("z + 1", "uses 'z'; features are x, y"),
        ("x % y", "may hold numbers"),
        ("x if y else 1", "may hold numbers"),
        ("x.real", "may hold numbers"),
        ("__import__('os')", "may hold numbers"),
        ("min(x)", "may hold numbers"),
        ("max(x, y, x)", "may hold numbers"),
        ("'text'", "may hold numbers"),
        ("True", "may hold numbers"),
        ("[x]", "may hold numbers"),
        ("(lambda: x)()", "may hold numbers"),
    ],
)
def test_anything_else_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Expression(text, NAMES)


def test_uses():
    expression = Expression("min(x, 2) * 3", NAMES)
    assert expression.uses("x") and not expression.uses("y") and not expression.uses("min")
