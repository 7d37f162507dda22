"""Expressions of scalars, their derivatives, and straight-line programs of them in C++.

Equal expressions are one, and nothing is simplified that changes a value, but for the sign of a
zero. In derivatives what is multiplied by zero vanishes, so that a Jacobian's structural zeros cost
nothing, where torch's have NaN if the other factor is infinite or NaN.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pnode.solvers.compiled.trace import Untraceable

__all__ = ["CODE", "Scalars", "Symbols"]

# A program of more operations takes minutes to compile.
_MOST_OPERATIONS = 40_000
#: Operation: C++, with its arguments.
CODE = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}",
    "sign": "double(({0} > 0.0) - ({0} < 0.0))", "maximum": "larger({}, {})",
    "minimum": "smaller({}, {})", "where": "{} != 0.0 ? {} : {}", "lt": "double({} < {})",
    "le": "double({} <= {})", "gt": "double({} > {})", "ge": "double({} >= {})",
    "eq": "double({} == {})", "ne": "double({} != {})",
    "logical_and": "double({} != 0.0 && {} != 0.0)", "logical_or": "double({} != 0.0 || {} != 0.0)",
    "logical_not": "double({} == 0.0)", "abs": "__builtin_fabs({})",
    "round": "__builtin_nearbyint({})", "atan2": "__builtin_atan2({}, {})",
    "pow": "__builtin_pow({}, {})",
}  # fmt: skip
# The compiler's own: headers take longer than all of a small program.
CODE |= {
    name: f"__builtin_{name}({{}})"
    for name in (
        "exp", "expm1", "log", "log1p", "log2", "log10", "exp2", "sqrt", "sin", "cos", "tan",
        "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc",
        "floor", "ceil", "trunc",
    )
}  # fmt: skip
_CONSTANT_BETWEEN = {
    "floor", "ceil", "trunc", "round", "sign", "lt", "le", "gt", "ge", "eq", "ne", "logical_and",
    "logical_or", "logical_not",
}  # fmt: skip
_COMMUTE = {"add", "mul"}
_FOLD: dict[str, Callable[..., float]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "neg": operator.neg, "sqrt": math.sqrt, "exp": math.exp, "log": math.log, "pow": math.pow,
}  # fmt: skip


class Symbols:
    """A tensor of expressions.

    Attributes
    ----------
    ids : Tensor
        Their numbers, int64.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def flat(self) -> list[int]:
        """Return the numbers one after the other."""
        numbers: list[int] = self.ids.reshape(-1).tolist()
        return numbers


class Scalars:
    """Expressions of scalars, each kept once; their numbers are in an order of evaluation."""

    def __init__(self) -> None:
        self._nodes: list[tuple[Any, ...]] = []
        self._numbers: dict[tuple[Any, ...], int] = {}
        self.constant(0.0)
        #: Whether 0 x and 0 / x are zero, which is wrong of values where x is NaN, infinite or 0.
        self.drops = True

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Evaluate values in here, rather than derivatives."""
        self.drops = False
        try:
            yield
        finally:
            self.drops = True

    # ------------------------------------------------------------------------------ expressions

    def _number(self, *node: Any) -> int:
        number = self._numbers.get(node)
        if number is None:
            if len(self._nodes) > _MOST_OPERATIONS:
                raise Untraceable(
                    f"it and its derivatives take more than {_MOST_OPERATIONS} scalar operations, "
                    "and implicit methods are compiled for small problems only"
                )
            number = self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
        return number

    def constant(self, value: float) -> int:
        """Return the number of a constant."""
        return self._number("constant", float(value).hex())

    def input(self, name: str, shape: Sequence[int]) -> Symbols:
        """Return the entries of an array of this name."""
        ids = [self._number("input", f"{name}[{index}]") for index in range(math.prod(shape))]
        return Symbols(torch.tensor(ids, dtype=torch.int64).reshape(tuple(shape)))

    def variable(self, name: str) -> Symbols:
        """Return a number of this name, as a 0-dim tensor."""
        return Symbols(torch.tensor(self._number("input", name)))

    def constants(self, values: torch.Tensor) -> Symbols:
        """Return a tensor of constants."""
        ids = [self.constant(value) for value in values.double().reshape(-1).tolist()]
        return Symbols(torch.tensor(ids, dtype=torch.int64).reshape(values.shape))

    def value(self, number: int) -> float | None:
        """Return what a constant is, None for what is none."""
        node = self._nodes[number]
        return float.fromhex(node[1]) if node[0] == "constant" else None

    def apply(self, name: str, *arguments: int) -> int:
        """Return the number of an operation's result."""
        values = [self.value(number) for number in arguments]
        if name in _FOLD and None not in values:
            try:
                return self.constant(_FOLD[name](*values))
            except (ArithmeticError, ValueError):
                pass  # as it will come
        first = arguments[0]
        match name:
            case "add":
                if 0.0 in values:
                    return arguments[1 - values.index(0.0)]
            case "sub":
                if values[1] == 0.0:
                    return first
                if values[0] == 0.0:
                    return self.apply("neg", arguments[1])
            case "mul":
                if 0.0 in values and self.drops:
                    return 0
                for number in (1.0, -1.0):
                    if number in values:
                        other = arguments[1 - values.index(number)]
                        return other if number > 0 else self.apply("neg", other)
            case "div":
                if values[0] == 0.0 and self.drops:
                    return 0
                if values[1] == 1.0:
                    return first
            case "neg":
                if self._nodes[first][0] == "neg":
                    return int(self._nodes[first][1])
            case "where":
                if arguments[1] == arguments[2]:
                    return arguments[1]
                if values[0] is not None:
                    return arguments[1 if values[0] else 2]
            case "pow":
                return self._power(first, arguments[1], values[1])
        if name in _COMMUTE:
            arguments = tuple(sorted(arguments))
        return self._number(name, *arguments)

    def _power(self, base: int, exponent: int, value: float | None) -> int:
        if value == 0.0:
            return self.constant(1.0)
        if value == 0.5:
            return self.apply("sqrt", base)
        if value is None or value != int(value) or abs(value) > 8:
            return self._number("pow", base, exponent)
        result = base
        for _ in range(abs(int(value)) - 1):
            result = self.apply("mul", result, base)
        return result if value > 0 else self.apply("div", self.constant(1.0), result)

    def total(self, terms: Iterable[int]) -> int:
        """Return the sum."""
        result = 0
        for term in terms:
            result = self.apply("add", result, term)
        return result

    def product_sum(self, left: Sequence[int], right: Sequence[int]) -> int:
        """Return the sum of the products of two rows."""
        return self.total(self.apply("mul", a, b) for a, b in zip(left, right, strict=True))

    # ------------------------------------------------------------------------------- derivatives

    def _partials(self, number: int) -> list[tuple[int, int]]:
        """Return the arguments that an expression depends on smoothly, and its derivatives."""
        name, *arguments = self._nodes[number]
        if name in ("constant", "input") or name in _CONSTANT_BETWEEN:
            return []
        rule = _DERIVATIVES.get(name)
        if rule is None:
            raise Untraceable(f"the derivative of {name} is not known here")
        found = rule(_Rules(self), number, *arguments)
        slopes = found if isinstance(found, tuple) else (found,)
        # Of a choice the condition, which comes first, has no derivative.
        smooth = arguments[len(arguments) - len(slopes) :]
        return [(a, slope) for a, slope in zip(smooth, slopes, strict=True) if slope is not None]

    def gradient(self, result: int, inputs: Sequence[int]) -> list[int]:
        """Return the derivatives of an expression with respect to inputs."""
        slopes = {result: self.constant(1.0)}
        for number in reversed(self._needed([result])):
            slope = slopes.get(number, 0)
            if slope:
                for argument, partial in self._partials(number):
                    term = self.apply("mul", slope, partial)
                    slopes[argument] = self.apply("add", slopes.get(argument, 0), term)
        return [slopes.get(number, 0) for number in inputs]

    def directional(self, results: Sequence[int], direction: int) -> list[int]:
        """Return the derivatives of expressions with respect to one input."""
        slopes = {direction: self.constant(1.0)}
        for number in self._needed(results):
            if number not in slopes:
                pairs = [(slopes.get(a, 0), p) for a, p in self._partials(number)]
                slopes[number] = self.total(self.apply("mul", s, p) for s, p in pairs if s)
        return [slopes.get(number, 0) for number in results]

    def substituted(self, results: Sequence[int], values: dict[int, int]) -> list[int]:
        """Return expressions with others in place of some of their inputs."""
        made = dict(values)
        for number in self._needed(results):
            name, *arguments = self._nodes[number]
            if number not in made:
                leaf = name in ("constant", "input")
                made[number] = number if leaf else self.apply(name, *(made[a] for a in arguments))
        return [made[number] for number in results]

    def depends(self, results: Iterable[int], arguments: Iterable[int]) -> bool:
        """Whether one of the results depends on one of other expressions."""
        return not set(arguments).isdisjoint(self._needed(results))

    def _needed(self, results: Iterable[int]) -> list[int]:
        """Return the numbers of all expressions that these depend on, in order."""
        seen, pending = set(), list(results)
        while pending:
            number = pending.pop()
            if number not in seen:
                seen.add(number)
                if self._nodes[number][0] not in ("constant", "input"):
                    pending.extend(self._nodes[number][1:])
        return sorted(seen)

    # -------------------------------------------------------------------------------------- code

    def code(self, results: Sequence[tuple[str, int]]) -> str:
        """Return C++ statements ``target expression;``, such as ``"f[0] ="``, and what they need.

        Parameters
        ----------
        results : sequence of (str, int)
            Targets and expressions.
        """
        lines = []
        for number in self._needed(expression for _, expression in results):
            name, *arguments = self._nodes[number]
            if name not in ("constant", "input"):
                code = CODE[name].format(*map(self._name, arguments))
                lines.append(f"const double x{number} = {code};")
        lines += [f"{target} {self._name(number)};" for target, number in results]
        return "\n".join(f"  {line}" for line in lines)

    def _name(self, number: int) -> str:
        node = self._nodes[number]
        if node[0] == "input":
            return str(node[1])
        if node[0] != "constant":
            return f"x{number}"
        value = float.fromhex(node[1])
        if not math.isfinite(value):
            sign = "-" if value < 0 else ""
            return '__builtin_nan("")' if math.isnan(value) else f"({sign}__builtin_inf())"
        return f"({value!r})"


class _Rules:
    """The operations that derivatives are made of, as methods."""

    def __init__(self, scalars: Scalars) -> None:
        self._scalars = scalars

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *arguments: self._scalars.apply(name, *arguments)

    def number(self, value: float) -> int:
        """Return a constant."""
        return self._scalars.constant(value)

    def over(self, x: int, value: float = 1.0) -> int:
        """Return value / x."""
        return self._scalars.apply("div", self.number(value), x)

    def plus_square(self, x: int, sign: float = 1.0) -> int:
        """Return 1 + sign x^2, sign 1 or -1."""
        square = self._scalars.apply("mul", x, x)
        return self._scalars.apply("add" if sign > 0 else "sub", self.number(1.0), square)

    def power(self, number: int, a: int, b: int) -> tuple[int, int | None]:
        """Return the derivatives of a^b, those at 0^b by b and of a^0 by a being zero."""
        do, zero = self._scalars.apply, self.number(0.0)
        by_base = do("mul", b, do("pow", a, do("sub", b, self.number(1.0))))
        if self._scalars.value(b) is not None:
            return by_base, None
        by_base = do("where", do("eq", b, zero), zero, by_base)
        flat = do("logical_and", do("eq", a, zero), do("ge", b, zero))
        return by_base, do("where", flat, zero, do("mul", number, do("log", a)))

    def bell(self, a: int, factor: float) -> int:
        """Return 2 factor / sqrt(pi) exp(-a^2)."""
        do = self._scalars.apply
        bell = do("exp", do("neg", do("mul", a, a)))
        return do("mul", self.number(2.0 / math.sqrt(math.pi) * factor), bell)

    def choice(self, left: int, both: int) -> tuple[int, int]:
        """Return the derivatives of a or b, whichever was taken, and half of each of ``both``."""
        own = self._scalars.apply("where", both, self.number(0.5), left)
        return own, self._scalars.apply("sub", self.number(1.0), own)


# The derivatives of x = name(a, b...) with respect to its arguments, from r, the rules, x, a, b.
_DERIVATIVES: dict[str, Callable[..., Any]] = {
    "add": lambda r, x, a, b: (r.number(1.0), r.number(1.0)),
    "sub": lambda r, x, a, b: (r.number(1.0), r.number(-1.0)),
    "mul": lambda r, x, a, b: (b, a),
    "div": lambda r, x, a, b: (r.over(b), r.neg(r.div(x, b))),
    "neg": lambda r, x, a: r.number(-1.0),
    "abs": lambda r, x, a: r.sign(a),
    "exp": lambda r, x, a: x,
    "exp2": lambda r, x, a: r.mul(r.number(math.log(2.0)), x),
    "expm1": lambda r, x, a: r.add(x, r.number(1.0)),
    "log": lambda r, x, a: r.over(a),
    "log2": lambda r, x, a: r.over(a, 1.0 / math.log(2.0)),
    "log10": lambda r, x, a: r.over(a, 1.0 / math.log(10.0)),
    "log1p": lambda r, x, a: r.over(r.add(r.number(1.0), a)),
    "sqrt": lambda r, x, a: r.over(x, 0.5),
    "sin": lambda r, x, a: r.cos(a),
    "cos": lambda r, x, a: r.neg(r.sin(a)),
    "tan": lambda r, x, a: r.plus_square(x),
    "asin": lambda r, x, a: r.over(r.sqrt(r.plus_square(a, -1.0))),
    "acos": lambda r, x, a: r.neg(r.over(r.sqrt(r.plus_square(a, -1.0)))),
    "atan": lambda r, x, a: r.over(r.plus_square(a)),
    "atan2": lambda r, x, a, b: (
        r.div(b, r.add(r.mul(a, a), r.mul(b, b))),
        r.neg(r.div(a, r.add(r.mul(a, a), r.mul(b, b)))),
    ),
    "sinh": lambda r, x, a: r.cosh(a),
    "cosh": lambda r, x, a: r.sinh(a),
    "tanh": lambda r, x, a: r.plus_square(x, -1.0),
    "asinh": lambda r, x, a: r.over(r.sqrt(r.plus_square(a))),
    "acosh": lambda r, x, a: r.over(r.sqrt(r.sub(r.mul(a, a), r.number(1.0)))),
    "atanh": lambda r, x, a: r.over(r.plus_square(a, -1.0)),
    "erf": lambda r, x, a: r.bell(a, 1.0),
    "erfc": lambda r, x, a: r.bell(a, -1.0),
    "pow": lambda r, x, a, b: r.power(x, a, b),
    "maximum": lambda r, x, a, b: r.choice(r.ge(a, b), r.eq(a, b)),
    "minimum": lambda r, x, a, b: r.choice(r.le(a, b), r.eq(a, b)),
    "where": lambda r, x, c, a, b: (r.where(c, r.number(1.0), 0), r.where(c, 0, r.number(1.0))),
}
