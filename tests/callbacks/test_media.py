import io
import json

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_generative.callbacks.media import RECORDS, log_image, log_record, logger_step
from tests import tiny

RECORD = {"name": "FID", "value": 12.5, "counts": [3, 4], "settings": {"seed": 0, "average": None, "exact": True}}


def _trainer(tmp_path, *loggers) -> L.Trainer:
    return tiny.trainer(tmp_path, logger=list(loggers))


def _picture(channels: int = 3) -> torch.Tensor:
    return torch.arange(4 * 5 * channels, dtype=torch.uint8).reshape(4, 5, channels)


def _events(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


class Recorder(WandbLogger):
    """Notes what it would send to W&B; what really arrives is tested in tests/test_loggers.py."""

    def __init__(self) -> None:
        super().__init__(experiment=object())
        self.images: list = []
        self.metrics: list = []

    def log_image(self, key, images, step=None) -> None:
        self.images.append((key, images, step))

    def log_metrics(self, metrics, step=None) -> None:
        self.metrics.append((metrics, step))


def test_a_picture_is_shown_beside_the_scalars_of_its_update(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    log_image(_trainer(tmp_path, logger), "samples", _picture(), step=7)
    logger.finalize("success")
    (image,) = _events(tmp_path / "run").Images("samples")
    assert image.step == 6
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), _picture().numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_wandb_gets_a_picture_and_not_floats(tmp_path, channels):
    logger = Recorder()
    log_image(_trainer(tmp_path, logger), "samples", _picture(channels), step=7)
    ((key, (picture,), step),) = logger.images
    assert (key, step) == ("samples", 6)
    np.testing.assert_array_equal(np.asarray(picture).reshape(4, 5, channels), _picture(channels).numpy())


@pytest.mark.parametrize(
    ("picture", "got"),
    [
        (torch.zeros(4, 5, 3), r"torch.float32 \(4, 5, 3\)"),
        (torch.zeros(3, 4, 5, dtype=torch.uint8), r"torch.uint8 \(3, 4, 5\)"),
        (torch.zeros(4, 5, dtype=torch.uint8), r"torch.uint8 \(4, 5\)"),
    ],
)
def test_what_is_no_uint8_picture_is_refused(tmp_path, picture, got):
    with pytest.raises(ValueError, match=rf"log_image: 'x' must be a uint8 picture .*, got {got}. Make one with"):
        log_image(_trainer(tmp_path), "x", picture, step=1)


def test_a_record_is_a_line_beside_the_csv_file_at_once(tmp_path):
    trainer = _trainer(tmp_path, CSVLogger(tmp_path, name="", version="run"))
    log_record(trainer, "val/fid_record", RECORD, step=500)
    log_record(trainer, "val/fid_record", RECORD | {"value": 3.5}, step=1000)
    first, second = map(json.loads, (tmp_path / "run" / RECORDS).read_text().splitlines())
    assert first == {"step": 499, "key": "val/fid_record", "record": RECORD}
    assert (second["step"], second["record"]["value"]) == (999, 3.5)


def test_a_record_is_a_text_of_tensorboard_that_can_be_read_back(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    log_record(_trainer(tmp_path, logger), "val/fid_record", RECORD, step=500)
    logger.finalize("success")
    events = _events(tmp_path / "run")
    (event,) = events.Tensors("val/fid_record/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 499
    assert json.loads(text) == RECORD
    assert all(line.startswith("    ") for line in text.splitlines())


def test_a_record_is_nested_values_of_wandb(tmp_path):
    logger = Recorder()
    log_record(_trainer(tmp_path, logger), "val/fid_record", RECORD, step=500)
    assert logger.metrics == [({"val/fid_record": RECORD}, 499)]


def test_a_record_that_is_no_plain_data_is_refused_by_every_logger(tmp_path):
    with pytest.raises(TypeError, match=r"log_record: 'r' must hold numbers, .*: Object of type Tensor is not JSON"):
        log_record(_trainer(tmp_path), "r", {"value": torch.zeros(())}, step=1)


def test_without_a_logger_nothing_is_written(tmp_path):
    log_record(_trainer(tmp_path), "r", RECORD, step=1)
    log_image(_trainer(tmp_path), "x", _picture(), step=1)
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    logger = Recorder()
    trainer = _trainer(tmp_path, logger, CSVLogger(tmp_path, name="", version="run"))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log_record(trainer, "r", RECORD, step=1)
    log_image(trainer, "x", _picture(), step=1)
    assert not list(tmp_path.rglob(RECORDS))
    assert logger.metrics == logger.images == []


@pytest.mark.parametrize(("step", "expected"), [(0, 0), (1, 0), (2, 1)])
def test_loggers_count_updates_from_zero(step, expected):
    assert logger_step(step) == expected
