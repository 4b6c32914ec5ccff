"""How the kernels are compiled: on the first call, to code that is kept on disk and gives the same bits everywhere.

No fast math and no parallel loops: sums keep the order that is written. Division by zero is what IEEE 754 says.
"""

from __future__ import annotations

from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

from numba import njit

Function = Callable[..., Any]

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
# Python never calls these.
_INNER: dict[str, Any] = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def inner(function: Function) -> Function:
    """Compile a function that only kernels of the same file call; it becomes part of each of them."""
    compiled: Function = njit(**_INNER)(function)
    return compiled


class kernel:  # noqa: N801 - a decorator
    """Compile a function on its first call and keep its machine code on disk, in ``__pycache__`` or the user's cache.

    A cache that cannot be read or written costs the time of compiling, nothing else. Numba names what it keeps after
    the function and looks at the text of one file: a kernel and all that it calls stand in one file, and each is
    called with arguments of one type, so that two processes that compile at once write the same.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self.__doc__ = function.__doc__
        try:
            self.compiled: Function = njit(cache=True, **_OPTIONS)(function)
        except RuntimeError:  # No folder that can be written.
            self.compiled = njit(**_OPTIONS)(function)

    def __call__(self, *arguments: Any) -> Any:
        """Run the kernel; arguments are arrays, numpy scalars and whole numbers."""
        try:
            return self.compiled(*arguments)
        except (OSError, EOFError, ValueError, UnpicklingError):
            # A kernel raises none of these: the cache is damaged, full or gone.
            self.compiled = njit(**_OPTIONS)(self._function)
            return self.compiled(*arguments)
