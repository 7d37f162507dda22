"""The vector field as the integrators see it: values, JVPs, VJPs and Jacobians on flat states.

The only module that calls autograd. Everything is in the integrator's time s = direction * t, for
the field g(s, y) = direction * f(direction * s, y), and in PETSc's precision outside, the user's
precision inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pnode.errors import ConfigurationError, VectorFieldError
from pnode.problem import InitialValueProblem
from pnode.solution import Ledger

__all__ = ["Linearization", "Products", "VectorField"]


class Products(NamedTuple):
    """Products of a cotangent w with the derivatives of g (for a residual, g = -F).

    Attributes
    ----------
    state : Tensor
        w^T dg/du, shape ``(size,)``, the user's precision.
    parameters : tuple of Tensor or None
        w^T dg/dp, one per parameter; None where the field does not use it.
    rate : Tensor or None
        w^T dF/du_dot, shape ``(size,)``; None if F = u_dot - g, when it is w itself.
    """

    state: torch.Tensor
    parameters: tuple[torch.Tensor | None, ...]
    rate: torch.Tensor | None = None


class VectorField:
    """Evaluate the user's f on flat states.

    Parameters
    ----------
    problem : InitialValueProblem
        Whose f, layout, direction and parameters are used.
    ledger : Ledger
        Where evaluations are counted.
    """

    def __init__(self, problem: InitialValueProblem, ledger: Ledger) -> None:
        self.problem = problem
        self.ledger = ledger
        self.parameters = problem.parameters
        self.dtype = problem.layout.dtype
        #: Whether the first evaluation used each parameter.
        self.used = [False] * len(problem.parameters)
        self._layout = problem.layout
        self._direction = problem.direction
        self._check_first = True

    def rhs(self, s: float, u: torch.Tensor) -> torch.Tensor:
        """Return g(s, u), flat, in the user's precision.

        Parameters
        ----------
        s : float
            Time.
        u : Tensor
            Flat state, shape ``(size,)``, the user's precision. f gets it as it is, so it must not
            share memory with anything that will change.

        Raises
        ------
        VectorFieldError
            If f returns the wrong type, shape, dtype or device, or writes into its input.
        """
        if self._check_first and self.problem.check_undeclared:
            return self.linearize(s, u).flat_value()
        self.ledger.rhs += 1
        with torch.no_grad():
            value = self._call(s, u, self._layout.unflatten(u), self._time(s)).reshape(-1)
            return value if self._direction > 0 else -value

    def linearize(
        self, s: float, u: torch.Tensor, differentiate_time: bool = False
    ) -> Linearization:
        """Evaluate f at (s, u) with its graph, for products with the Jacobian.

        Parameters
        ----------
        s : float
            Time.
        u : Tensor
            Flat state as in :meth:`rhs`.
        differentiate_time : bool
            Whether the derivative with respect to time is wanted too.
        """
        self.ledger.rhs += 1
        # A single tensor becomes a leaf in its own shape: no reshaping in the graph.
        leaf = u if self._layout.is_tuple else u.view(self._layout.shapes[0])
        leaf.requires_grad_(True)
        time = self._time(s).requires_grad_(differentiate_time)
        if torch.is_grad_enabled():
            value = self._record(s, leaf, time)
        else:
            with torch.enable_grad():
                value = self._record(s, leaf, time)
        return Linearization(self, leaf, value, self._direction, time)

    def _time(self, s: float) -> torch.Tensor:
        """Return the user's time as f gets it."""
        layout = self._layout
        return torch.scalar_tensor(self._direction * s, dtype=layout.dtype, device=layout.device)

    def _record(self, s: float, leaf: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Call f on a leaf, under grad."""
        first, self._check_first = self._check_first, False
        # torch has an error of its own for writing into a leaf. The first time, f gets a copy of
        # the leaf, so that the write goes through and _call reports it.
        own = leaf.clone() if first else leaf
        try:
            value = self._call(
                s, own, self._layout.unflatten(own) if self._layout.is_tuple else own, time
            )
        except RuntimeError as error:
            if "leaf Variable" in str(error) or "created in no_grad mode" in str(error):
                raise self._wrote_into_input(s, " (or into a parameter)") from error
            raise
        if first and self.problem.check_undeclared:
            self._find_parameters(value, leaf, time)
        return value

    def _call(self, s: float, own: torch.Tensor, state: Any, time: torch.Tensor) -> torch.Tensor:
        """Call f in the user's time on ``state``, made from ``own``, and check what comes back.

        Returns
        -------
        Tensor
            f's result in its own shape; flat for a tuple. Not yet in the integrator's direction.
        """
        layout = self._layout
        version = own._version
        result = self.problem.function(time, state)
        if own._version != version:
            raise self._wrote_into_input(s)
        if not layout.is_tuple:
            if (
                type(result) is torch.Tensor
                and result.shape == layout.shapes[0]
                and result.dtype is layout.dtype
                and result.device == layout.device
                and result.layout is torch.strided
            ):
                return result
            parts = (result,)
        else:
            parts = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        self._check_result(s, parts)
        return torch.cat([part.reshape(-1) for part in parts]) if layout.is_tuple else result

    def _wrote_into_input(self, s: float, or_what: str = "") -> VectorFieldError:
        return VectorFieldError(
            f"the vector field wrote into its input y{or_what}; compute on y.clone(), or without "
            "in-place operations",
            time=self._direction * s,
        )

    def _check_result(self, s: float, parts: tuple[Any, ...]) -> None:
        layout = self._layout
        problem = None
        if len(parts) != len(layout.shapes):
            problem = f"returned {len(parts)} tensors for a state of {len(layout.shapes)}"
        for index, (part, shape) in enumerate(zip(parts, layout.shapes, strict=False)):
            where = f" (part {index})" if layout.is_tuple else ""
            if not isinstance(part, torch.Tensor):
                problem = f"returned a {type(part).__name__}{where}, not a tensor"
            elif part.layout is not torch.strided:
                problem = f"returned a tensor of layout {part.layout}{where}; use to_dense()"
            elif part.shape != shape:
                problem = f"returned shape {tuple(part.shape)}{where} for a state of {tuple(shape)}"
            elif part.dtype is not layout.dtype:
                problem = (
                    f"returned {part.dtype}{where} for a state of {layout.dtype}; give the module "
                    "and the state the same precision (module.double() or y0.float())"
                )
            elif part.device != layout.device:
                problem = (
                    f"returned a tensor on {part.device}{where} for a state on {layout.device}"
                )
            if problem:
                break
        if problem:
            raise VectorFieldError(f"the vector field {problem}", time=self._direction * s)

    def _find_parameters(
        self, result: torch.Tensor, state: torch.Tensor, time: torch.Tensor
    ) -> None:
        """Walk the graph of the first evaluation: every trainable leaf must be declared."""
        leaves = {id(tensor): index for index, tensor in enumerate(self.parameters)}
        edges = {
            (parameter.grad_fn, parameter.output_nr): index
            for index, parameter in enumerate(self.parameters)
            if parameter.grad_fn is not None
        }
        pending, seen = [(result.grad_fn, result.output_nr)], set()
        while pending:
            edge = pending.pop()
            node = edge[0]
            if node is None or edge in seen:
                continue
            seen.add(edge)
            if edge in edges:
                self.used[edges[edge]] = True
                continue
            leaf = getattr(node, "variable", None)
            if leaf is not None and leaf is not state and leaf is not time:
                if id(leaf) not in leaves:
                    raise ConfigurationError(
                        f"the vector field uses a tensor of shape {tuple(leaf.shape)} that "
                        "requires grad and was not declared: pass it in params=[...], make the "
                        "vector field a torch.nn.Module that owns it, or detach it"
                    )
                self.used[leaves[id(leaf)]] = True
            pending.extend(node.next_functions)


class Linearization:
    """f and its graph at one point; products with dg/dy and its transpose.

    Parameters
    ----------
    field : VectorField
        The field.
    leaf : Tensor
        The state, in the user's shape (flat for a tuple) and precision, a leaf of the graph.
    value : Tensor
        f's result with its graph, in the same shape.
    direction : float
        g = direction * f.
    time : Tensor
        The user's time, a leaf of the graph if its derivative is wanted.
    """

    def __init__(
        self,
        field: VectorField,
        leaf: torch.Tensor,
        value: torch.Tensor,
        direction: float,
        time: torch.Tensor,
    ) -> None:
        self._field = field
        self._leaf = leaf
        self._value = value
        self._direction = direction
        self._time = time
        self._matrix: torch.Tensor | None = None
        self._double_backward: tuple[torch.Tensor, torch.Tensor] | None = None

    def flat_value(self) -> torch.Tensor:
        """Return g at this point, flat, without its graph."""
        value = self._value.detach().reshape(-1)
        return value if self._direction > 0 else -value

    def vjp(self, w: torch.Tensor) -> Products:
        """Return w^T dg/dy and w^T dg/dp from one backward pass.

        Parameters
        ----------
        w : Tensor
            Flat cotangent, shape ``(size,)``, the user's precision.
        """
        # The graph is kept even for a single product: part of it may be the user's, from
        # parameters that are not leaves.
        inputs = (self._leaf, *self._field.parameters)
        self._field.ledger.vjp += 1
        products: tuple[torch.Tensor | None, ...] = (None,) * len(inputs)
        if self._value.requires_grad:
            cotangent = (w if self._direction > 0 else -w).view(self._value.shape)
            products = torch.autograd.grad(
                self._value, inputs, cotangent, retain_graph=True, allow_unused=True
            )
        return Products(self._flat(products[0]), products[1:])

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """Return dg/dy v, flat, by differentiating the VJP with respect to its cotangent.

        The VJP w -> w^T J is linear in w, so its own VJP with v is J v. Its graph is built once
        per point and serves every Krylov iteration there.
        """
        self._field.ledger.jvp += 1
        if self._double_backward is None:
            self._double_backward = self._record_vjp()
        cotangent, product = self._double_backward
        result = None
        if product.requires_grad:
            direction = (v if self._direction > 0 else -v).view(product.shape)
            (result,) = torch.autograd.grad(
                product, cotangent, direction, retain_graph=True, allow_unused=True
            )
        return self._flat(result)

    def _record_vjp(self) -> tuple[torch.Tensor, torch.Tensor]:
        cotangent = torch.zeros_like(self._value, requires_grad=True)
        product = None
        if self._value.requires_grad:
            with torch.enable_grad():
                (product,) = torch.autograd.grad(
                    self._value, self._leaf, cotangent, create_graph=True, allow_unused=True
                )
        return cotangent, torch.zeros_like(self._leaf) if product is None else product

    def second_vjp(self, w: torch.Tensor, v: torch.Tensor) -> Products:
        """Return the derivatives of w^T (dg/dy) v with respect to y and the parameters.

        By differentiating the VJP w^T dg/dy, in the direction v, once more.

        Parameters
        ----------
        w, v : Tensor
            Flat, shape ``(size,)``, the user's precision; both constant.
        """
        cotangent = w if self._direction > 0 else -w
        return self._differentiate_vjp(cotangent, self._leaf, v.view(self._leaf.shape))

    def time_derivative(self) -> torch.Tensor:
        """Return dg/ds, flat, the user's precision; zero if the graph does not contain time.

        With g(s, y) = d f(d s, y) and d = 1 or -1, this is df/dt.
        """
        result = None
        if self._value.requires_grad and self._time.requires_grad:
            cotangent = torch.zeros_like(self._value, requires_grad=True)
            with torch.enable_grad():
                (product,) = torch.autograd.grad(
                    self._value, self._time, cotangent, create_graph=True, allow_unused=True
                )
            if product is not None and product.requires_grad:
                self._field.ledger.jvp += 1
                (result,) = torch.autograd.grad(product, cotangent, allow_unused=True)
        return (torch.zeros_like(self._value) if result is None else result).reshape(-1)

    def time_derivative_vjp(self, w: torch.Tensor) -> Products:
        """Return the derivatives of w^T dg/ds with respect to y and the parameters."""
        return self._differentiate_vjp(w, self._time, torch.ones_like(self._time))

    def _differentiate_vjp(
        self, cotangent: torch.Tensor, leaf: torch.Tensor, direction: torch.Tensor
    ) -> Products:
        """Differentiate <f_leaf^T cotangent, direction>, leaf being the state or time."""
        inputs = (self._leaf, *self._field.parameters)
        products: tuple[torch.Tensor | None, ...] = (None,) * len(inputs)
        self._field.ledger.vjp += 1
        if self._value.requires_grad and leaf.requires_grad:
            with torch.enable_grad():
                (product,) = torch.autograd.grad(
                    self._value, leaf, cotangent.view(self._value.shape), create_graph=True,
                    allow_unused=True,
                )  # fmt: skip
            if product is not None and product.requires_grad:
                products = torch.autograd.grad(
                    product, inputs, direction, retain_graph=True, allow_unused=True
                )
        return Products(self._flat(products[0]), products[1:])

    def jacobian(self) -> torch.Tensor:
        """Return dg/dy as a dense matrix, shape ``(size, size)``, the user's precision.

        All rows come from one batched backward pass; fields that torch cannot batch are done row
        by row. Computed once per point.
        """
        if self._matrix is None:
            self._matrix = self._compute_jacobian()
        return self._matrix

    def _compute_jacobian(self) -> torch.Tensor:
        self._field.ledger.jacobians += 1
        size = self._leaf.numel()
        identity = torch.eye(size, dtype=self._leaf.dtype, device=self._leaf.device)
        if not self._value.requires_grad:
            return torch.zeros_like(identity)
        rows = (identity if self._direction > 0 else -identity).view(size, *self._value.shape)
        matrix: torch.Tensor | None
        try:
            (matrix,) = torch.autograd.grad(
                self._value, self._leaf, rows, retain_graph=True, allow_unused=True,
                is_grads_batched=True,
            )  # fmt: skip
        except RuntimeError:  # no batching rule for an operation of this field
            products = [
                torch.autograd.grad(
                    self._value, self._leaf, row, retain_graph=True, allow_unused=True
                )[0]
                for row in rows
            ]
            matrix = None if products[0] is None else torch.stack(products)
        return torch.zeros_like(identity) if matrix is None else matrix.reshape(size, size)

    def _flat(self, product: torch.Tensor | None) -> torch.Tensor:
        return (torch.zeros_like(self._leaf) if product is None else product).reshape(-1)
