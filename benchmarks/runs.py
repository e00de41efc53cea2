"""What benchmarks of whole trainings share: a run of ``litgen`` in a process, and its figures in a table."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def litgen(command: str, config: Path, folder: Path, options: Sequence[str]) -> float:
    """Run ``litgen`` on one thread in a folder of its own; returns the CPU seconds of the whole process.

    Raises:
        RuntimeError: If it fails; its output is in ``log_<command>.txt`` there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    arguments = [sys.executable, "-m", "lit_generative", command, "--config", str(config), *quiet, *options]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    output = folder / f"log_{command}.txt"
    with output.open("w") as log:
        process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} failed: see {output}.")
    return usage.ru_utime + usage.ru_stime


def recalled(result: Path, key: list[Any]) -> dict[str, Any] | None:
    """What was measured under the same key before, and written to ``result``, if anything."""
    if result.exists() and (done := json.loads(result.read_text()))["key"] == key:
        return dict(done["scores"])
    return None


def remembered(name: str, result: Path, key: list[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured under the same key before, or is measured now, told, and written to ``result``."""
    if (before := recalled(result, key)) is not None:
        return before
    scores = measure()
    result.write_text(json.dumps({"key": key, "scores": scores}))
    print(name, {score: round(value, 4) for score, value in scores.items()}, flush=True)
    return scores


def spread(form: str, values: Sequence[float]) -> str:
    """Mean, and standard deviation where there are several."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"
