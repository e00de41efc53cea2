import csv

import pytest

from lit_generative.training.csv_logger import CSVLogger


def _logger(tmp_path, **kwargs) -> CSVLogger:
    return CSVLogger(str(tmp_path), name="runs", version="only", **kwargs)


def _rows(tmp_path) -> list[dict[str, str]]:
    with open(tmp_path / "runs" / "only" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def _write(logger: CSVLogger, steps, **values) -> None:
    for step in steps:
        logger.log_metrics({key: value + step for key, value in values.items()}, step)
    logger.save()


def test_rows_are_written_with_their_step(tmp_path):
    _write(_logger(tmp_path), range(3), loss=0.5)
    assert _rows(tmp_path) == [{"loss": str(0.5 + step), "step": str(step)} for step in range(3)]


def test_rows_are_flushed_every_20_steps_without_being_told(tmp_path):
    logger = _logger(tmp_path)
    for step in range(20):
        logger.log_metrics({"loss": 1.0}, step)
    assert len(_rows(tmp_path)) == 20


def test_a_new_logger_in_the_same_folder_keeps_the_rows(tmp_path):
    _write(_logger(tmp_path), range(3), loss=0.5)
    _write(_logger(tmp_path), range(3, 5), loss=0.5)
    assert [row["step"] for row in _rows(tmp_path)] == ["0", "1", "2", "3", "4"]


def test_opening_the_folder_keeps_the_rows_before_anything_is_logged(tmp_path):
    _write(_logger(tmp_path), range(3), loss=0.5)
    assert _logger(tmp_path).experiment is not None
    assert len(_rows(tmp_path)) == 3


def test_continuing_drops_the_rows_that_will_come_again(tmp_path):
    _write(_logger(tmp_path), range(5), loss=0.5)
    logger = _logger(tmp_path)
    logger.continue_from(3)
    _write(logger, range(3, 6), loss=100.0)
    assert [(row["step"], row["loss"]) for row in _rows(tmp_path)] == [
        ("0", "0.5"),
        ("1", "1.5"),
        ("2", "2.5"),
        ("3", "103.0"),
        ("4", "104.0"),
        ("5", "105.0"),
    ]


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (5, 5), (99, 5)])
def test_continuing_keeps_exactly_the_rows_of_steps_below(tmp_path, step, kept):
    _write(_logger(tmp_path), range(5), loss=0.5)
    logger = _logger(tmp_path)
    logger.continue_from(step)
    assert logger.experiment is not None
    assert [row["step"] for row in _rows(tmp_path)] == [str(i) for i in range(kept)]


def test_a_row_cut_off_by_a_kill_is_dropped_when_continuing(tmp_path):
    _write(_logger(tmp_path), range(3), loss=0.5)
    with open(tmp_path / "runs" / "only" / "metrics.csv", "a") as file:
        file.write("3.")
    logger = _logger(tmp_path)
    logger.continue_from(3)
    _write(logger, [3], loss=0.5)
    assert [row["step"] for row in _rows(tmp_path)] == ["0", "1", "2", "3"]


def test_columns_that_come_later_leave_earlier_rows_empty_there(tmp_path):
    _write(_logger(tmp_path), range(2), loss=0.5)
    logger = _logger(tmp_path)
    _write(logger, [2], **{"val/fid": 9.0})
    _write(logger, [3], loss=0.5, kl=1.0)
    assert [(row["step"], row["loss"], row["val/fid"], row["kl"]) for row in _rows(tmp_path)] == [
        ("0", "0.5", "", ""),
        ("1", "1.5", "", ""),
        ("2", "", "11.0", ""),
        ("3", "3.5", "", "4.0"),
    ]


def test_a_prefix_stands_before_every_key_and_continuing_still_works(tmp_path):
    _write(_logger(tmp_path, prefix="a"), range(3), loss=0.5)
    logger = _logger(tmp_path, prefix="a")
    logger.continue_from(1)
    _write(logger, [1], loss=7.0)
    assert [(row["step"], row["a-loss"]) for row in _rows(tmp_path)] == [("0", "0.5"), ("1", "8.0")]


def test_without_a_version_each_logger_takes_the_next_folder(tmp_path):
    for _ in range(2):
        _write(CSVLogger(str(tmp_path), name="runs"), [0], loss=1.0)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["version_0", "version_1"]
