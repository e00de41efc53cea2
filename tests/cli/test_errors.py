"""A wrong class, key, type or file: one line that names the key and the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_generative.__main__ import main
from lit_generative.cli.errors import find_class, merged_config, wrong_keys

CONFIGS = Path(__file__).parents[2] / "configs"
GAN = str(CONFIGS / "gan/dcgan_digits.yaml")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def error_of(capsys, *options: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *options])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if "Seed set" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("litgen: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("option", "value", "key", "right"),
    [
        ("--model.init_args.los.init_args.margin", "2", "model.los", "loss"),
        ("--model.discriminator_step", "2", "model.discriminator_step", "discriminator_steps"),
        ("--model.generator.init_args.widht", "2", "model.generator.widht", "width"),
        ("--model.generator_optimizer.init_args.lrr", "1e-3", "model.generator_optimizer.lrr", "lr"),
        ("--trainer.max_stepz", "3", "trainer.max_stepz", "max_steps"),
        ("--data.batch_siz", "3", "data.batch_siz", "batch_size"),
        ("--seed_everythin", "3", "seed_everythin", "seed_everything"),
        ("--model.loss", "lit_generative.gan.losses.Hing", "model.loss", "Hinge"),
        ("--model.loss", "lit_generative.gan.loses.Hinge", "model.loss", "lit_generative.gan.losses.Hinge"),
        ("--data", "lit_generative.data.digits.Digit", "data", "Digits"),
    ],
)
def test_a_wrong_key_or_class_on_the_command_line_names_the_right_one(capsys, option, value, key, right):
    error = error_of(capsys, "--config", GAN, option, value)
    assert f" {key}: " in error
    assert error.endswith(f"Did you mean {right}?")


@pytest.mark.parametrize(
    ("right", "wrong", "key"),
    [
        ("latent_dim: 64", "latent_dimm: 64", "model.generator.latent_dimm"),
        ("every_n_steps: 500, num", "every_n_stepz: 500, num", "trainer.callbacks[1].every_n_stepz"),
        ("max_steps:", "max_stepz:", "trainer.max_stepz"),
        ("seed_everything:", "seed_everythin:", "seed_everythin"),
        ("init_args: {half_life", "init_arg: {half_life", "trainer.callbacks[0].init_arg"),
        ("DCGANGenerator", "DCGANGeneratr", "model.generator"),
        ("torch.optim.Adam", "torch.optim.Adm", "model.generator_optimizer"),
    ],
)
def test_a_wrong_key_or_class_in_a_file_names_the_right_one(capsys, tmp_path, right, wrong, key):
    text = Path(GAN).read_text()
    assert right in text
    (tmp_path / "wrong.yaml").write_text(text.replace(right, wrong))
    error = error_of(capsys, "--config", str(tmp_path / "wrong.yaml"))
    assert f" {key}: " in error
    assert "Did you mean " in error


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        (("--trainer.max_steps", "many"), "trainer.max_steps", "int"),
        (("--model.generator.init_args.latent_dim", "wide"), "model.generator.latent_dim", "int"),
        (("--data.resize", "shrink"), "data.resize", "'pad', 'stretch', 'crop'"),
    ],
)
def test_a_wrong_type_names_the_whole_key_what_is_expected_and_what_came(capsys, options, key, expected):
    error = error_of(capsys, "--config", GAN, *options)
    assert f" {key}: " in error
    assert expected in error
    assert options[1] in error


def test_a_missing_file_names_the_nearest(capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    error = error_of(capsys, "--config", "configs/gan/dcgan_digit.yaml")
    assert error.endswith("Did you mean configs/gan/dcgan_digits.yaml?")


def test_broken_yaml_names_file_and_line(capsys, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: [1,\ndata: }")
    error = error_of(capsys, "--config", str(tmp_path / "broken.yaml"))
    assert "broken.yaml is not valid YAML" in error
    assert "line 2" in error


def test_no_config_at_all_says_what_to_type(capsys):
    assert "litgen fit --config" in error_of(capsys)


def test_a_name_far_from_all_lists_what_there_is(capsys):
    error = error_of(capsys, "--config", GAN, "--model.loss.qqqq", "1")
    assert "model.loss.qqqq" in error
    assert "There are" in error or "no such argument" in error


def test_a_right_config_has_no_wrong_keys():
    for path in sorted(CONFIGS.rglob("*.yaml")):
        config, _ = merged_config(["fit", "--config", str(path), "--model.init_args.optimizer.init_args.lr=1"])
        assert [key for key in wrong_keys(config) if "optimizer" not in key] == [], path


def test_a_class_is_found_by_its_path():
    cls, problem = find_class("lit_generative.gan.losses.Hinge")
    assert (cls.__name__, problem) == ("Hinge", None)
