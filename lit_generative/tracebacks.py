"""Where an error came from. Imports no torch."""

from __future__ import annotations

import dis
from collections.abc import Iterator


def is_ours(error: BaseException) -> bool:
    """Whether the error was raised by this package's own code, so that its message was written for the user.

    A ``RuntimeError`` is also what torch raises of tensors that do not fit: ours is one that a ``raise`` raised.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lit_generative"):
        return False
    raised = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised or not isinstance(error, RuntimeError)


def causes(error: BaseException) -> Iterator[BaseException]:
    """``error``, what it was raised from or while handling, and so on; each once, as two may name each other."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
