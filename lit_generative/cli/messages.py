"""What the command says when something goes wrong. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator


def report(error: BaseException, code: int = 1, hint: str = "") -> int:
    """Print an error that already says what to do, without its frames; ``LITGEN_TRACEBACK=1`` shows them.

    Args:
        error: What was raised.
        code: The exit code.
        hint: What to do, if the error does not say it.

    Returns:
        ``code``.
    """
    if os.environ.get("LITGEN_TRACEBACK"):
        raise error
    print(f"litgen: error: {error}{hint and ' '}{hint}", file=sys.stderr)  # noqa: T201
    return code


OFFLINE = "W&B: set WANDB_MODE=offline to keep the run on disk and upload it later with `wandb sync`."


def wandb_errors() -> tuple[type[Exception], ...]:
    """What W&B raises without a key or a network; nothing if it is not in use."""
    module = sys.modules.get("wandb.errors.errors")
    return () if module is None else (module.Error,)


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
