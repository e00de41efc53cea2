"""Every notebook runs from its first to its last cell, is short, and lies in git without outputs."""

from __future__ import annotations

import ast
import os
import re
import resource
from pathlib import Path

import nbclient
import nbformat
import pytest

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
    """Trains a twentieth of the updates; the rest of a notebook stays as it is."""

    trainers = ("train", "run_of", "sd['teach']", "llama['write']")
    updates = 60
    """The least that a schedule with a warm-up takes."""

    def __init__(self) -> None:
        self._trains = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        outside, self._trains = self._trains, self._trains or ast.unparse(node.func) in self.trainers
        self.generic_visit(node)
        self._trains = outside
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        outside, self._trains = self._trains, ast.unparse(node.targets[0]) == "STEPS"
        self.generic_visit(node)
        self._trains = outside
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            return ast.Constant(re.sub(r"(?<=val_check_interval=)\d+", "20", node.value))
        if self._trains and type(node.value) is int and node.value > self.updates:
            return ast.Constant(max(self.updates, node.value // 20))
        return node


def run(notebook: nbformat.NotebookNode) -> float:
    """Execute, check for pictures and against warnings; returns the CPU seconds it took."""
    start = seconds_of_children()
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert [output.text for output in outputs if output.output_type == "stream"] == []
    return seconds_of_children() - start


@pytest.mark.slow  # half a minute
@pytest.mark.timeout(900)
@notebooks
def test_it_runs_and_shows_pictures_with_a_twentieth_of_the_updates(path):
    notebook = read(path)
    whole = "".join(cell.source for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = ast.unparse(Smaller().visit(ast.parse(cell.source)))
    run(notebook)
    assert len(re.findall(r"\b60\b", "".join(cell.source for cell in notebook.cells))) > len(
        re.findall(r"\b60\b", whole)
    )


@pytest.mark.whole  # a minute or two
@pytest.mark.timeout(900)
@notebooks
def test_the_whole_of_it_takes_less_than_three_minutes(path):
    assert run(read(path)) < 180
