"""Scores as readable expressions: a checked subset of Python's arithmetic over named tensors."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

Value = float | torch.Tensor
TINY = 1e-9  # keeps quotients and logarithms finite
LARGEST_EXPONENT = 30.0


def _tensor(x: Value) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float32)


def _divide(a: Value, b: Value) -> torch.Tensor:
    a, b = _tensor(a), _tensor(b)
    return a / torch.where(b.abs() < TINY, TINY, b)


def _power(a: Value, b: Value) -> torch.Tensor:
    return (_tensor(b) * _tensor(a).clamp(min=TINY).log()).clamp(max=LARGEST_EXPONENT).exp()


BINARY: dict[type[ast.operator], tuple[str, Callable[[Value, Value], Value]]] = {
    ast.Add: ("+", lambda a, b: a + b),
    ast.Sub: ("-", lambda a, b: a - b),
    ast.Mult: ("*", lambda a, b: a * b),
    ast.Div: ("/", _divide),
    ast.Pow: ("**", _power),
}
FUNCTIONS: dict[str, tuple[int, Callable[..., Value]]] = {
    "min": (2, lambda a, b: torch.minimum(_tensor(a), _tensor(b))),
    "max": (2, lambda a, b: torch.maximum(_tensor(a), _tensor(b))),
    "log": (1, lambda a: _tensor(a).clamp(min=TINY).log()),
    "exp": (1, lambda a: _tensor(a).clamp(max=LARGEST_EXPONENT).exp()),
    "sqrt": (1, lambda a: _tensor(a).clamp(min=0.0).sqrt()),
    "abs": (1, lambda a: _tensor(a).abs()),
}


@dataclass(frozen=True)
class Expression:
    """An expression over features, such as ``"recent + 0.3 * cumulative * (position / seq_len) ** 0.25"``.

    Every operation is total: x / 0 divides by 1e-9, log(x) and x ** y see at least 1e-9, sqrt(x) at least 0, exp(x)
    and x ** y stay below e ** 30.

    Raises ValueError for text that is no expression, or uses a name, an operator or a function that does not exist.
    """

    text: str
    names: tuple[str, ...]  # features that it may use
    tree: ast.expr = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise ValueError(f"expression {self.text!r} cannot be read: {error}") from None
        for node in walk(tree):
            self._check(node)
        object.__setattr__(self, "tree", tree)

    def _check(self, node: ast.expr) -> None:
        if isinstance(node, ast.Name):
            if node.id in self.names:
                return
            raise ValueError(f"expression uses {node.id!r}; features are {', '.join(self.names)}")
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return
        if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
            return
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            known = FUNCTIONS.get(node.func.id)
            if known is not None and len(node.args) == known[0]:
                return
        operators = ", ".join(sign for sign, _ in BINARY.values())
        functions = ", ".join(f"{name}({', '.join('xy'[:count])})" for name, (count, _) in FUNCTIONS.items())
        raise ValueError(f"expression may hold numbers, features, {operators}, {functions}; got {ast.unparse(node)!r}")

    def uses(self, name: str) -> bool:
        """Whether the feature occurs."""
        return any(isinstance(node, ast.Name) and node.id == name for node in walk(self.tree))

    def __call__(self, features: Mapping[str, Value]) -> torch.Tensor:
        """The value for tensors that broadcast against each other, float32."""
        return _tensor(_evaluate(self.tree, features)).float()


def walk(node: ast.expr) -> Iterator[ast.expr]:
    """The node and all operands below it; names of functions are not operands."""
    yield node
    for child in operands(node):
        yield from walk(child)


def operands(node: ast.expr) -> list[ast.expr]:
    """The direct operands of a node."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    return list(node.args) if isinstance(node, ast.Call) else []


def _evaluate(node: ast.expr, features: Mapping[str, Value]) -> Value:
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]  # checked at construction
    if isinstance(node, ast.Name):
        return features[node.id]
    values = [_evaluate(child, features) for child in operands(node)]
    if isinstance(node, ast.BinOp):
        return BINARY[type(node.op)][1](*values)
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name), "checked at construction"
        return FUNCTIONS[node.func.id][1](*values)
    return -values[0]


@cache
def parse(text: str, names: tuple[str, ...]) -> Expression:
    """``Expression``, read once per text."""
    return Expression(text, names)
