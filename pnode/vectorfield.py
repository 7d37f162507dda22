"""The vector field as the integrators see it: values, JVPs, VJPs and Jacobians on flat states.

The only module that calls autograd. Everything is in the integrator's time s = direction * t, for
the field g(s, y) = direction * f(direction * s, y), and in PETSc's precision outside, the user's
precision inside.
"""

from __future__ import annotations

from typing import Any

import torch

from pnode.errors import ConfigurationError, VectorFieldError
from pnode.problem import InitialValueProblem
from pnode.solution import Ledger

__all__ = ["Linearization", "VectorField"]


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
        self.ledger.rhs += 1
        if self._check_first and self.problem.check_undeclared:
            self.ledger.rhs -= 1
            return self.linearize(s, u).value.detach()
        with torch.no_grad():
            return self._call(s, u)

    def linearize(self, s: float, u: torch.Tensor) -> Linearization:
        """Evaluate f at (s, u) with its graph, for products with the Jacobian.

        Parameters
        ----------
        s : float
            Time.
        u : Tensor
            Flat state as in :meth:`rhs`; it becomes a leaf of the graph.
        """
        self.ledger.rhs += 1
        u.requires_grad_(True)
        first, self._check_first = self._check_first, False
        with torch.enable_grad():
            # torch has an error of its own for writing into a leaf. The first time, f gets a copy
            # of the leaf, so that the write goes through and _call reports it.
            try:
                value = self._call(s, u.clone() if first else u)
            except RuntimeError as error:
                if "leaf Variable" in str(error) and "in-place" in str(error):
                    raise self._wrote_into_input(s) from error
                raise
        if first and self.problem.check_undeclared:
            self._find_parameters(value, u)
        return Linearization(self, s, u, value)

    def _call(self, s: float, own: torch.Tensor) -> torch.Tensor:
        """Call f in the user's time and shape, and check what comes back."""
        layout = self._layout
        time = torch.scalar_tensor(self._direction * s, dtype=layout.dtype, device=layout.device)
        version = own._version
        result = self.problem.function(time, layout.unflatten(own))
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
                flat = result.reshape(-1)
                return flat if self._direction > 0 else -flat
            parts = (result,)
        else:
            parts = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        self._check_result(s, parts)
        flat = torch.cat([part.reshape(-1) for part in parts])
        return flat if self._direction > 0 else -flat

    def _wrote_into_input(self, s: float) -> VectorFieldError:
        return VectorFieldError(
            "the vector field wrote into its input y; compute on y.clone(), or without in-place "
            "operations",
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

    def _find_parameters(self, result: torch.Tensor, state: torch.Tensor) -> None:
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
            if leaf is not None and leaf is not state:
                if id(leaf) not in leaves:
                    raise ConfigurationError(
                        f"the vector field uses a tensor of shape {tuple(leaf.shape)} that "
                        "requires grad and was not declared: pass it in params=[...], make the "
                        "vector field a torch.nn.Module that owns it, or detach it"
                    )
                self.used[leaves[id(leaf)]] = True
            pending.extend(node.next_functions)


class Linearization:
    """f and its graph at one point; products with df/dy and its transpose.

    Parameters
    ----------
    field : VectorField
        The field.
    s : float
        Time.
    u : Tensor
        Flat state in the user's precision, a leaf of the graph.
    value : Tensor
        g(s, u) with its graph.
    """

    def __init__(self, field: VectorField, s: float, u: torch.Tensor, value: torch.Tensor) -> None:
        self._field = field
        self.s = s
        self.u = u
        self.value = value
        self._double_backward: tuple[torch.Tensor, torch.Tensor] | None = None

    def vjp(self, w: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """Return w^T dg/dy and w^T dg/dp from one backward pass.

        Parameters
        ----------
        w : Tensor
            Flat cotangent, shape ``(size,)``, the user's precision.

        Returns
        -------
        state : Tensor
            Shape ``(size,)``, the user's precision.
        parameters : tuple of Tensor or None
            One per parameter; None where f does not use it.
        """
        # The graph is kept even for a single product: part of it may be the user's, from
        # parameters that are not leaves.
        inputs = (self.u, *self._field.parameters)
        self._field.ledger.vjp += 1
        products: tuple[torch.Tensor | None, ...] = (None,) * len(inputs)
        if self.value.requires_grad:
            products = torch.autograd.grad(
                self.value, inputs, w, retain_graph=True, allow_unused=True
            )
        state = torch.zeros_like(self.u) if products[0] is None else products[0]
        return state, products[1:]

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """Return dg/dy v, flat, by differentiating the VJP with respect to its cotangent.

        The VJP w -> w^T J is linear in w, so its own VJP with v is J v. Its graph is built once
        per point and serves every Krylov iteration there.
        """
        self._field.ledger.jvp += 1
        if self._double_backward is None:
            self._double_backward = self._record_vjp()
        cotangent, product = self._double_backward
        if not product.requires_grad:
            return torch.zeros_like(self.u)
        (result,) = torch.autograd.grad(product, cotangent, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.u) if result is None else result

    def _record_vjp(self) -> tuple[torch.Tensor, torch.Tensor]:
        cotangent = torch.zeros_like(self.value, requires_grad=True)
        product = None
        if self.value.requires_grad:
            with torch.enable_grad():
                (product,) = torch.autograd.grad(
                    self.value, self.u, cotangent, create_graph=True, allow_unused=True
                )
        return cotangent, torch.zeros_like(self.u) if product is None else product

    def jacobian(self) -> torch.Tensor:
        """Return dg/dy as a dense matrix, shape ``(size, size)``, the user's precision.

        All rows come from one batched backward pass; fields that torch cannot batch are done row
        by row.
        """
        self._field.ledger.jacobians += 1
        size = self.u.numel()
        identity = torch.eye(size, dtype=self.u.dtype, device=self.u.device)
        if not self.value.requires_grad:
            return torch.zeros_like(identity)
        matrix: torch.Tensor | None
        try:
            (matrix,) = torch.autograd.grad(
                self.value, self.u, identity, retain_graph=True, allow_unused=True,
                is_grads_batched=True,
            )  # fmt: skip
        except RuntimeError:  # no batching rule for an operation of this field
            rows = [
                torch.autograd.grad(self.value, self.u, row, retain_graph=True, allow_unused=True)[
                    0
                ]
                for row in identity
            ]
            matrix = None if rows[0] is None else torch.stack(rows)
        return torch.zeros_like(identity) if matrix is None else matrix
