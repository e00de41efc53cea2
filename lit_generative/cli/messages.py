"""What the command says when something goes wrong. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator


def report(error: BaseException, code: int = 1) -> int:
    """Print an error that already says what to do, without its frames; ``LITGEN_TRACEBACK=1`` shows them.

    Returns:
        ``code``.
    """
    if os.environ.get("LITGEN_TRACEBACK"):
        raise error
    print(f"litgen: error: {error}", file=sys.stderr)  # noqa: T201
    return code


def is_ours(error: BaseException) -> bool:
    """Whether the error was raised by this package's own code, so that its message was written for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lit_generative")


def causes(error: BaseException) -> Iterator[BaseException]:
    """``error``, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
