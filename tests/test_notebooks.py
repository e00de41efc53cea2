"""Every notebook runs from its first to its last cell, is short, and lies in git without outputs."""

from __future__ import annotations

import ast
import io
import multiprocessing
import os
import re
import resource
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import matplotlib
import nbclient
import nbformat
import pytest
from diffusers.utils import logging as diffusers_logging
from matplotlib import pyplot
from transformers.utils import logging as transformers_logging

import lit_generative.__main__  # noqa: F401  (once, for all notebooks)

matplotlib.use("Agg")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "notebooks").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS)


def read(path: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / path, as_version=4)


def seconds_of_children() -> float:
    """CPU time of ended processes: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_there_is_one_of_gans():
    assert "notebooks/01_gan.ipynb" in NOTEBOOKS


@notebooks
def test_it_has_at_most_fifteen_cells_and_defines_no_class(path):
    cells = read(path).cells
    assert len(cells) <= 15
    for cell in cells:
        if cell.cell_type == "code":
            assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(cell.source)))


@notebooks
def test_its_outputs_are_stripped(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


class Smaller(ast.NodeTransformer):
    """Trains a twentieth of the updates on less data, and draws a fifth of the images; the rest stays.

    Args:
        least: The fewest updates of a training.
    """

    trainers = ("train", "run_of", "sd['teach']", "llama['write']", "nll")
    fewer: ClassVar[dict[int, int]] = {20: 5, 50: 10, 100: 20}
    """Images, points, draws and steps of samplers; everywhere, so that labels and samples stay as many."""

    data: ClassVar[dict[str, str]] = {
        "ring_": "--data.num_samples=2000",
        "digits.yaml": "--data.batch_size=16",
        "ddpm_": "--model.network.init_args.widths=[8, 16]",
        "guided_": "--model.network.init_args.widths=[8, 16]",
    }
    """Options of a training, by what is in the name of its config."""

    def __init__(self, least: int) -> None:
        self.least = least
        self.shrunk = 0
        """Numbers of updates that were."""
        self._trains = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        outside, self._trains = self._trains, self._trains or ast.unparse(node.func) in self.trainers
        self.generic_visit(node)
        self._trains = outside
        if self._trains or not node.args or not isinstance(node.args[0], ast.Constant):
            return node
        node.args += [ast.Constant(less) for data, less in self.data.items() if data in str(node.args[0].value)]
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        outside, self._trains = self._trains, ast.unparse(node.targets[0]) == "STEPS"
        self.generic_visit(node)
        self._trains = outside
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            return ast.Constant(re.sub(r"(?<=val_check_interval=)\d+", "20", node.value))
        if self._trains and type(node.value) is int and node.value > self.least:
            self.shrunk += 1
            return ast.Constant(max(self.least, node.value // 20))
        return ast.Constant(self.fewer.get(node.value, node.value) if type(node.value) is int else node.value)


def run(notebook: nbformat.NotebookNode) -> float:
    """Execute, check for pictures and against warnings; returns the CPU seconds it took."""
    start = seconds_of_children()
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert [output.text for output in outputs if output.output_type == "stream"] == []
    return seconds_of_children() - start


def run_cells(cells: list[str], spoken: Path) -> None:
    """Execute code as a kernel does, and count the pictures; for a process of its own."""
    sys.stdout = sys.stderr = spoken.open("w")
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    os.chdir(ROOT / "notebooks")
    for bars in (diffusers_logging, transformers_logging):
        bars.disable_progress_bar()  # which a kernel shows as widgets
    names: dict[str, object] = {"__name__": "__main__"}
    pictures = 0
    for cell in cells:
        exec(cell, names)
        for number in pyplot.get_fignums():
            pyplot.figure(number).savefig(io.BytesIO())
            pictures += 1
        pyplot.close("all")
    assert pictures >= 3


@pytest.mark.slow  # a quarter of a minute
@pytest.mark.timeout(900)
@notebooks
def test_it_runs_and_shows_pictures_with_a_twentieth_of_the_updates(path, tmp_path, monkeypatch):
    cells = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    warms_up = any("total_steps" in cell for cell in cells)
    smaller = Smaller(least=51 if warms_up else 20)  # the rates' warm-up takes 50
    cells = [ast.unparse(smaller.visit(ast.parse(cell))) for cell in cells]
    assert smaller.shrunk > 0
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the notebooks leave their files
    # A fork has its own folder, loggers and seed, and need not import what this process did: five seconds each.
    process = multiprocessing.get_context("fork").Process(target=run_cells, args=(cells, tmp_path / "spoken"))
    process.start()
    process.join()
    assert (tmp_path / "spoken").read_text() == ""
    assert process.exitcode == 0


@pytest.mark.whole  # a minute or two
@pytest.mark.timeout(900)
@notebooks
def test_the_whole_of_it_takes_less_than_three_minutes(path):
    assert run(read(path)) < 180
