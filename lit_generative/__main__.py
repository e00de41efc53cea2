"""``litgen``: the one command. Help and the parsing of our own commands import nothing heavy."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_generative.cli.messages import OFFLINE, report, wandb_errors
from lit_generative.tracebacks import is_ours

TRAINER_COMMANDS = {
    "fit": "train, or resume with --ckpt_path last",
    "validate": "score a checkpoint on the validation data",
    "test": "score a checkpoint on the test data",
    "predict": "draw samples with the run's own config, on any number of devices",
}
OWN_COMMANDS = {
    "sample": "draw from a checkpoint alone",
    "ema": "choose the length of the weights' average after training",
    "export": "write a checkpoint in the form of another library",
    "convert": "make a checkpoint from a file of another library",
    "evaluate": "score images or a checkpoint against reference images",
}
"""Each is a module of that name in ``cli``, with ``add_arguments(parser)`` and ``run(options)``, which gives the files
written and lines to print; neither may import torch before it runs."""
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``litgen`` with ``argv`` (default: the command line).

    Returns:
        The exit code: 0, 1 (the run failed), 2 (wrong arguments or config), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in TRAINER_COMMANDS:
            from lit_generative.cli import lightning

            return lightning.main(arguments)
        parser = _parser()
        options = parser.parse_args(arguments or ["--help"])
        for result in _command(options.command).run(options):
            print(f"wrote {result}" if isinstance(result, Path) else result)  # noqa: T201  the command's answer
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except wandb_errors() as error:
        return report(error, hint=OFFLINE)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not is_ours(error):
            raise
        return report(error)


def _parser() -> argparse.ArgumentParser:
    from lit_generative import __version__

    parser = argparse.ArgumentParser(
        prog="litgen",
        description="Train, evaluate and sample generative models with PyTorch Lightning.",
        epilog="Try: litgen fit --config configs/diffusion/ddpm_digits.yaml",
    )
    parser.add_argument("--version", action="version", version=f"lit-generative {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=f"{text} (litgen {name} --help)", add_help=False)
    for name, text in OWN_COMMANDS.items():
        module = _command(name)
        module.add_arguments(commands.add_parser(name, help=text, description=module.__doc__))
    return parser


def _command(name: str) -> Any:
    return importlib.import_module(f"lit_generative.cli.{name}")


if __name__ == "__main__":
    sys.exit(main())
