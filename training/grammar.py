"""Random expressions, their mutations and crossovers. Trees are those of Python's ast; texts are what is kept."""

from __future__ import annotations

import ast
import math
import random
from dataclasses import dataclass

from smartkv_ext.policies.expression import BINARY, FUNCTIONS, Expression, operands, parse, walk
from smartkv_ext.policies.features import carries_one

MAX_NODES = 41
_DEPTH = 3


@dataclass(frozen=True)
class Grammar:
    """Expressions over ``names``; every method takes the random numbers it uses."""

    names: tuple[str, ...]

    def tidy(self, tree: ast.expr) -> str | None:
        """The text of a tree with its constant parts folded; None if it is too large, constant as a whole, or asks more
        of packed records than they carry.
        """
        tree = _fold(tree)
        text = ast.unparse(tree)
        expression = parse(text, self.names)
        if size(expression) > MAX_NODES or not any(isinstance(node, ast.Name) for node in walk(expression.tree)):
            return None
        return text if carries_one(expression) else None

    def random_tree(self, rng: random.Random, depth: int = _DEPTH) -> ast.expr:
        """A tree of at most ``depth`` levels of operators."""
        if depth == 0 or rng.random() < 0.25:
            return self._leaf(rng)
        if rng.random() < 0.75:
            operator = rng.choice(list(BINARY))
            return ast.BinOp(self.random_tree(rng, depth - 1), operator(), self.random_tree(rng, depth - 1))
        name = rng.choice(list(FUNCTIONS))
        arguments = [self.random_tree(rng, depth - 1) for _ in range(FUNCTIONS[name][0])]
        return ast.Call(ast.Name(name), arguments, [])

    def mutate(self, text: str, rng: random.Random) -> tuple[str, ast.expr]:
        """(kind of mutation, mutated tree)."""
        tree = parse(text, self.names).tree
        nodes = list(walk(tree))
        constants = [i for i, node in enumerate(nodes) if isinstance(node, ast.Constant)]
        kind = rng.choice(["constant", "constant", "leaf", "operator", "subtree", "wrap", "shrink"])
        if kind == "constant" and constants:
            i = rng.choice(constants)
            return kind, replace(tree, i, _constant(float(nodes[i].value) * math.exp(rng.gauss(0, 0.5))))  # type: ignore[attr-defined]
        i = rng.randrange(len(nodes))
        if kind == "leaf":
            i = rng.choice([j for j, node in enumerate(nodes) if not operands(node)])
            return kind, replace(tree, i, self._leaf(rng))
        if kind == "operator" and isinstance(nodes[i], ast.BinOp):
            left, right = operands(nodes[i])
            return kind, replace(tree, i, ast.BinOp(left, rng.choice(list(BINARY))(), right))
        if kind == "wrap":
            operator = rng.choice(list(BINARY))
            return kind, replace(tree, i, ast.BinOp(nodes[i], operator(), self.random_tree(rng, 1)))
        if kind == "shrink" and operands(nodes[i]):
            return kind, replace(tree, i, rng.choice(operands(nodes[i])))
        return "subtree", replace(tree, i, self.random_tree(rng, 2))

    def cross(self, text: str, other: str, rng: random.Random) -> ast.expr:
        """``text`` with one part replaced by a part of ``other``."""
        tree, donor = parse(text, self.names).tree, parse(other, self.names).tree
        part = rng.choice(list(walk(donor)))
        return replace(tree, rng.randrange(sum(1 for _ in walk(tree))), part)

    def _leaf(self, rng: random.Random) -> ast.expr:
        if rng.random() < 0.4:
            return _constant(rng.choice([0.1, 0.3, 0.5, 1.0, 2.0, 32.0, 128.0]) * math.exp(rng.gauss(0, 0.3)))
        return ast.Name(rng.choice(self.names))


def size(expression: Expression) -> int:
    """Number of nodes."""
    return sum(1 for _ in walk(expression.tree))


def replace(tree: ast.expr, index: int, new: ast.expr) -> ast.expr:
    """A copy of ``tree`` with node ``index`` of ``walk`` replaced."""
    counter = iter(range(1 << 30))

    def build(node: ast.expr) -> ast.expr:
        if next(counter) == index:
            for _ in range(sum(1 for _ in walk(node)) - 1):
                next(counter)
            return new
        return _with_operands(node, [build(child) for child in operands(node)])

    return build(tree)


def _with_operands(node: ast.expr, children: list[ast.expr]) -> ast.expr:
    if isinstance(node, ast.BinOp):
        return ast.BinOp(children[0], node.op, children[1])
    if isinstance(node, ast.UnaryOp):
        return ast.UnaryOp(node.op, children[0])
    return ast.Call(node.func, children, []) if isinstance(node, ast.Call) else node


def _constant(value: float) -> ast.expr:
    """Three significant digits: an expression is for reading."""
    return ast.Constant(float(f"{min(abs(value), 1e6):.3g}"))


def _fold(node: ast.expr) -> ast.expr:
    children = [_fold(child) for child in operands(node)]
    if not children:
        return node
    node = _with_operands(node, children)
    if not any(isinstance(part, ast.Name) for part in walk(node)):
        value = Expression(ast.unparse(node), ())({}).item()
        return _constant(value) if value >= 0 else ast.UnaryOp(ast.USub(), _constant(value))
    return node
