"""Makes a client's method from the function that builds its call, so that both clients take the same arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Self = TypeVar("Self")
Call = TypeVar("Call")
Answer = TypeVar("Answer")


def method(
    name: str, build: Callable[Arguments, Call], send: Callable[[Self, Call], Answer]
) -> Callable[Concatenate[Self, Arguments], Answer]:
    """``self.name(...)`` is ``send(self, build(...))``, with the parameters and docstring of ``build``.

    Wrong arguments raise at once, also where ``send`` is a generator that has not begun.
    """

    def sending(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        return send(self, build(*args, **kwargs))

    shown: Any = functools.update_wrapper(sending, build)
    shown.__name__ = name
    shown.__qualname__ = name
    del shown.__wrapped__
    shown.__signature__ = _with_self(inspect.signature(build))
    return sending


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    """What ``build`` returns is our business, not the caller's, so it is not shown."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(
        parameters=[own, *signature.parameters.values()], return_annotation=inspect.Signature.empty
    )
