"""Every notebook runs from its first to its last cell, is short, and lies in git without outputs."""

from __future__ import annotations

import ast
import os
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


@pytest.mark.slow  # a minute or two
@pytest.mark.timeout(900)
@notebooks
def test_it_runs_and_shows_a_picture_in_under_three_minutes(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook, start = read(path), seconds_of_children()
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute(env=dict(os.environ))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert [output.text for output in outputs if output.output_type == "stream"] == []
    assert seconds_of_children() - start < 180
