"""What the command says when something goes wrong. Imports no torch."""

from __future__ import annotations

import os
import sys


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
