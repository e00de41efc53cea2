"""Runs scripts in processes that are forked from one which has imported everything: to start anew takes six seconds.

This file, run as a script, is that one. It reads a job in each line of its input, and answers with a number: 0 if all
went well. What is tested in the starting itself, or by signals, starts processes of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAVY = (
    "lightning",
    "tensorboard",
    "torch.distributed.fsdp",
    "lit_generative.cli.lightning",
    "lit_generative.networks.diffusers_unet",
    "lit_generative.finetune.causal_lm",
    "lit_generative.finetune.text_to_image",
)


def run(*argv: Any, ranks: int = 2, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
    """Run a script, or ``-m`` and a module, in processes that know of each other as Lightning's do.

    Args:
        argv: Path or module, and arguments.
        ranks: How many processes.
        cwd: Where; the root of the repository unless told.
        env: Added to this process's environment.

    Raises:
        RuntimeError: If one of them fails, with all that they printed.
    """
    with socket.socket() as free, tempfile.NamedTemporaryFile() as log:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        distributed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"} if ranks > 1 else {}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {}), **distributed}
        job = {"argv": [*map(str, argv)], "ranks": ranks, "cwd": str(cwd or ROOT), "env": environment, "log": log.name}
        if (answer := _answer(json.dumps(job))) != "0":
            raise RuntimeError(f"{' '.join(job['argv'])} ended with {answer}:\n{Path(log.name).read_text()}")


def _answer(job: str) -> str:
    warm = _warm()
    assert warm.stdin is not None
    assert warm.stdout is not None
    try:
        print(job, file=warm.stdin, flush=True)
        return warm.stdout.readline().strip()
    except BaseException:  # a test's time is over: the next one must not wait for what hangs
        _end(warm)
        _warm.cache_clear()
        raise


@functools.cache
def _warm() -> subprocess.Popen[str]:
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    atexit.register(_end, process)
    return process


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _serve() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    tests = sys.modules["tests"] = types.ModuleType("tests")  # packages that are installed may have one of that name
    tests.__path__ = [str(ROOT / "tests")]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(_all(json.loads(line)), file=answers, flush=True)


def _all(job: dict[str, Any]) -> int:
    """Exit status of the first process that fails, which ends the others; else 0."""
    pids = [os.fork() or _child(job, rank) for rank in range(job["ranks"])]
    failure = 0
    for _ in range(len(pids)):
        pid, status = os.wait()
        pids.remove(pid)
        if status and not failure:
            failure = status
            for other in pids:
                os.kill(other, signal.SIGKILL)
    return failure


def _child(job: dict[str, Any], rank: int) -> int:
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ.clear()
        os.environ.update(job["env"])
        if job["ranks"] > 1:
            os.environ["LOCAL_RANK"] = str(rank)
        os.chdir(job["cwd"])
        name, *arguments = job["argv"]
        if name == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [name, *arguments], str(Path(name).parent)
            runpy.run_path(name, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # a forked process must not go on in its parent's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
