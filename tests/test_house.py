"""The house stays a house: floors, sizes, and tests that mirror the rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lit_generative").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_imports_go_down_the_floors():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("path", names(SOURCES))
def test_no_source_file_is_longer_than_three_hundred_lines(path):
    assert len((ROOT / path).read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", names(TESTS))
def test_no_test_file_is_longer_than_twice_that(path):
    assert len((ROOT / path).read_text().splitlines()) <= 600


@pytest.mark.parametrize("path", names(SOURCES))
def test_no_function_has_more_than_thirty_statements(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef):
            statements = sum(isinstance(child, ast.stmt) for child in ast.walk(node)) - 1
            assert statements <= 30, f"{node.name} has {statements}"


@pytest.mark.parametrize("path", names([p for p in SOURCES if not p.name.startswith("__")]))
def test_each_source_file_has_its_test_file(path):
    source = Path(path).relative_to("lit_generative")
    assert (ROOT / "tests" / source.with_name(f"test_{source.name}")).exists()


def test_no_test_folder_is_left_without_its_room():
    folders = {path.parent.relative_to(ROOT / "tests") for path in TESTS} - {Path("learning")}
    assert [folder for folder in folders if not (ROOT / "lit_generative" / folder).is_dir()] == []


@pytest.mark.parametrize("path", names(SOURCES))
def test_the_library_neither_prints_nor_asserts_nor_catches_everything(path):
    allowed = ("__main__.py", "cli/messages.py", "cli/errors.py")
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert is for tests"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"line {node.lineno}: bare except"
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print":
            assert path.endswith(allowed), f"line {node.lineno}: print"


def test_the_constraints_hold_exact_versions_and_no_address():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        name, _, version = line.partition("==")
        assert name
        assert version
        assert not set("/@") & set(line), line
