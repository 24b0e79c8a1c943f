"""cuDSS through nvmath-python: the systems of all heads as one block-diagonal matrix, analysed once."""

import logging
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LOGGER = logging.getLogger("fastrpe.cudss")
LOGGER.setLevel(logging.ERROR)  # nvmath warns of each analysis by one thread


class System:
    """One matrix (n, n) and its right-hand sides (n, N), whose values change in place: the plan stays valid."""

    def __init__(self, matrix: Tensor, columns: int) -> None:
        from nvmath.sparse.advanced import DirectSolver

        n = len(matrix)
        start, column = matrix.crow_indices().int(), matrix.col_indices().int()  # cuDSS takes no other
        self.matrix = torch.sparse_csr_tensor(start, column, matrix.values().clone(), size=matrix.shape)
        self.rhs = matrix.values().new_zeros(columns, n).mT  # columns side by side, as cuDSS wants them
        _enter(matrix.device)
        self.solver: Any = DirectSolver(self.matrix, self.rhs, options={"logger": LOGGER})
        weakref.finalize(self, self.solver.free)  # which nvmath leaves to its user
        self.solver.plan()

    def factorise(self, values: Tensor) -> None:
        _enter(self.matrix.device)
        self.matrix.values().copy_(values)
        self.solver.factorize()

    def solve(
        self,
        x: Tensor,  # (n, N)
    ) -> Tensor:
        u = self._solve(x)
        return u + self._solve(x - self.matrix @ u)  # as SuperLU's

    def _solve(self, x: Tensor) -> Tensor:
        self.rhs.copy_(x)
        u: Tensor = self.solver.solve()
        return u


def _enter(device: torch.device) -> None:
    """cuda.core keeps a device's context by thread, and a backward pass has threads of its own."""
    from cuda.core import Device

    Device(device.index).set_current()


# For the tensor that holds a pattern: systems by heads, size, right-hand sides, device and transpose.
_systems: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def system(pairs: Tensor, matrix: Tensor, columns: int, adjoint: bool) -> System:
    known = _systems.setdefault(pairs, {})
    key = len(matrix), columns, matrix.device, adjoint, 0 if pairs.is_inference() else pairs._version
    if key not in known:
        known[key] = System(matrix, columns)
    found: System = known[key]
    return found
