"""The rule of an object that changes in place: one call at a time, and none traced."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.core

from sparse_adam.embedding.optimizer import is_traced

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def exclusive(
    method: Callable[Concatenate[Any, _Arguments], _Result],
) -> Callable[Concatenate[Any, _Arguments], _Result]:
    """Lets one thread at a time call a method, and none that JAX is tracing.

    The object has the lock, `_lock`, which one thread may take several times.
    """

    @functools.wraps(method)
    def call(self: Any, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        given = jax.tree.leaves((args, kwargs))
        if is_traced() or any(isinstance(x, jax.core.Tracer) for x in given):
            raise TypeError(
                f"{type(self).__name__}.{method.__name__} is being traced (jit, grad, "
                "scan), but this object changes in place, which compiled code can not. "
                "Call it outside; or use the functional core inside: pass "
                "embedding.state in, and call lookup(state, features) and "
                "apply_gradients(state, features, gradients)"
            )
        with self._lock:
            return method(self, *args, **kwargs)

    return call
