import os

import pytest
from jsonargparse import Namespace

from lit_generative.cli.run_folder import choose_run, last_checkpoint


def logger(save_dir, **init_args) -> Namespace:
    return Namespace(
        class_path="some.Logger",
        init_args=Namespace(**{"save_dir": str(save_dir), "name": "run", "version": None} | init_args),
    )


def config(*loggers) -> Namespace:
    return Namespace(logger=list(loggers))


def checkpoint(root, number: int, age: float = 0.0):
    path = root / "run" / f"version_{number}" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def versions(trainer: Namespace) -> list:
    return [logger.init_args.version for logger in trainer.logger]


def test_the_newest_last_checkpoint_is_found_whatever_its_number(tmp_path):
    newest = checkpoint(tmp_path, 0, age=1)
    checkpoint(tmp_path, 1, age=9)
    (tmp_path / "run" / "version_7").mkdir()  # a run killed before its first save
    assert last_checkpoint(config(logger(tmp_path))) == newest


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert last_checkpoint(config(logger(tmp_path))) is None
    assert last_checkpoint(Namespace(logger=None)) is None


def test_a_new_fit_takes_the_next_number_for_all_loggers(tmp_path):
    for number in (0, 9, 10):
        (tmp_path / "run" / f"version_{number}").mkdir(parents=True)
    (tmp_path / "run" / "version_x").mkdir()
    trainer = config(logger(tmp_path), logger(tmp_path))
    choose_run(trainer, "fit", None)
    assert versions(trainer) == ["version_11", "version_11"]


def test_a_version_in_the_config_is_kept(tmp_path):
    trainer = config(logger(tmp_path, version="mine"), logger(tmp_path))
    choose_run(trainer, "fit", None)
    assert versions(trainer) == ["mine", "version_0"]


@pytest.mark.parametrize(("command", "version"), [("fit", "version_3"), ("test", "version_3/test")])
def test_a_resumed_run_goes_on_in_its_folder_and_evaluation_in_one_inside(tmp_path, command, version):
    trainer = config(logger(tmp_path))
    choose_run(trainer, command, checkpoint(tmp_path, 3))
    assert versions(trainer) == [version]


def test_loggers_without_a_folder_are_left_alone():
    trainer = Namespace(logger=[Namespace(class_path="x.Other", init_args=Namespace(project="p")), True])
    choose_run(trainer, "fit", None)
    assert trainer.logger[0].init_args == Namespace(project="p")


def test_the_id_of_a_run_on_weights_and_biases_is_left_to_it(tmp_path):
    trainer = config(logger(tmp_path), logger(tmp_path, id=None))
    choose_run(trainer, "fit", None)
    assert versions(trainer) == ["version_0", None]
