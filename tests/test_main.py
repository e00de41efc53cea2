"""The command answers help at once, and the package costs nothing to import."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import lit_generative
from lit_generative.__main__ import OWN_COMMANDS, TRAINER_COMMANDS, main

HEAVY = "any(name in sys.modules for name in ('torch', 'lightning', 'numpy', 'jsonargparse'))"


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_nothing_heavy():
    assert python(f"import sys, lit_generative; print({HEAVY})").strip() == "False"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["sample", "--help"], ["ema", "--help"], ["evaluate", "--help"], ["--version"]]
)
def test_help_and_version_import_nothing_heavy_and_take_less_than_half_a_second(arguments):
    code = f"""
import sys
from lit_generative.__main__ import main
try:
    main({arguments})
except SystemExit as ended:
    print("code", ended.code, {HEAVY})
"""
    started = time.perf_counter()
    assert python(code).endswith("code 0 False\n")
    assert time.perf_counter() - started < 0.5


def test_python_m_is_the_same_command():
    command = [sys.executable, "-m", "lit_generative", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == f"lit-generative {lit_generative.__version__}"


def test_no_arguments_show_the_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert "sample" in capsys.readouterr().out


def test_the_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in (*TRAINER_COMMANDS, *OWN_COMMANDS))


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fitt"])
    assert ended.value.code == 2
    assert "fitt" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["GAN", "VAE", "VQVAE", "DDPM"])
def test_the_families_are_loaded_when_first_used(name):
    assert getattr(lit_generative, name).__name__ == name


def test_what_reads_a_checkpoints_average_is_at_hand():
    assert lit_generative.load_ema.__module__ == "lit_generative.loading"


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'GANN'"):
        lit_generative.GANN  # noqa: B018
