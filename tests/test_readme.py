"""What the README says works: its commands run (on fewer steps), its Python runs, its paths exist."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from lit_generative.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands(first: str) -> list[list[str]]:
    lines = [line.removeprefix(".venv/bin/") for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(first + " ")]


def shortened(command: list[str]) -> list[str]:
    if command[0] in ("sample", "evaluate", "export"):
        return ["10" if part == "100" else part for part in command]  # of samples, one for each label
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    if command[0] == "fit":
        steps = "3" if "--ckpt_path" in command and "4000" in command else "2"
        command = command[: command.index("--trainer.max_steps")] if "--trainer.max_steps" in command else command
        quiet += ["--trainer.max_steps", steps]
    return [*command, *quiet]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the configs, as a clone has them."""
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_litgen_command_runs_in_the_order_of_the_page(clone):
    (base,) = (command for command in commands("python") if command[0].startswith("tests/"))
    runpy.run_path(base[0])["write"](base[1])  # with random weights
    run = commands("litgen")
    assert {command[0] for command in run} == {"fit", "test", "predict", "sample", "evaluate", "export"}
    for command in run:
        assert main(shortened(command)) == 0, command
    assert (clone / "runs/ddpm_digits/grid.png").exists()
    assert (clone / "runs/ddpm_digits/samples.gif").exists()
    assert (clone / "samples/samples.npz").exists()
    assert (clone / "continued/samples.jsonl").exists()
    assert (clone / "adapter/adapter_model.safetensors").exists()
    assert "record" in json.loads((clone / "scores.json").read_text())


def test_make_does_what_the_plain_commands_do():
    flat = MAKEFILE.replace("\\\n", " ").replace("$(RUN)", "runs/ddpm_digits")
    for command in commands("litgen")[:2]:
        assert " ".join(["-m lit_generative", *command]) in re.sub(r"\s+", " ", flat)
    for command in (["-m", "pip"], ["-m", "pytest"]):
        assert "$(PY) " + " ".join(command) in MAKEFILE


@pytest.mark.parametrize("code", [b for b in blocks("python") if b.startswith("from ")])
def test_the_python_example_runs(code, clone):
    namespace: dict[str, object] = {}
    exec(code.replace("max_steps=100", 'max_steps=2, accelerator="cpu", enable_progress_bar=False'), namespace)
    assert namespace["images"].shape == (16, 1, 8, 8)


def test_the_loss_to_add_can_be_added():
    (code,) = blocks("python", (ROOT / "CONTRIBUTING.md").read_text())
    start = "from torch import Tensor\nfrom typing_extensions import override\n"
    namespace: dict[str, object] = {}
    exec(start + "from lit_generative.gan.losses import AdversarialLoss\n" + code, namespace)
    namespace["PearsonChiSquared"]()


def test_the_yaml_for_wandb_trains_offline(clone, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    (clone / "wandb.yaml").write_text(blocks("yaml")[0])
    files = ["--config", "configs/vae/vae_digits.yaml", "--config", "wandb.yaml"]
    assert main(shortened(["fit", *files])) == 0
    assert list(clone.rglob("offline-run-*"))
    assert (clone / "runs/my_run/version_0/checkpoints/last.ckpt").exists()


def test_paths_and_configs_that_are_named_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path
    for family, method, names in re.findall(r"`(\w+)/(\w+)_\{([\w,]+)\}\.yaml`", README):
        for name in names.split(","):
            assert yaml.safe_load((ROOT / f"configs/{family}/{method}_{name}.yaml").read_text())


def test_it_is_short():
    assert len(README.splitlines()) <= 200
