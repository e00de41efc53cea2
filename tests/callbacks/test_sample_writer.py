import os

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.sample_writer import SampleWriter
from lit_generative.tensor_ops import sample_generators, to_uint8
from tests import tiny


def _predict(tmp_path, module, data, writer=None, **kwargs) -> None:
    callbacks = [writer or SampleWriter(), *kwargs.pop("callbacks", [])]
    tiny.trainer(tmp_path, callbacks=callbacks, **kwargs).predict(module, data, return_predictions=False)


def test_each_sample_is_a_file_named_by_its_index(tmp_path):
    _predict(tmp_path, tiny.vae(), tiny.digits(num_predict_samples=5, eval_batch_size=2))
    assert sorted(os.listdir(tmp_path / "predictions")) == [f"{i:06d}.png" for i in range(5)]


def test_a_png_holds_the_sample_drawn_by_hand(tmp_path):
    L.seed_everything(4, verbose=False)
    module = tiny.vae()
    _predict(tmp_path, module, tiny.digits(num_predict_samples=5, eval_batch_size=2))
    pixels = to_uint8(module.sample(5, generator=sample_generators(4, 5)))
    assert len(pixels.flatten(1).unique(dim=0)) == 5
    for i in range(5):
        written = np.asarray(Image.open(tmp_path / "predictions" / f"{i:06d}.png"))
        np.testing.assert_array_equal(written, pixels[i, 0].numpy())


def test_images_of_three_channels_are_written_in_colour(tmp_path):
    image = torch.linspace(-1, 1, 3 * 2 * 4).reshape(3, 2, 4)
    SampleWriter._write(image, tmp_path / "000007")
    written = np.asarray(Image.open(tmp_path / "000007.png"))
    np.testing.assert_array_equal(written, to_uint8(image).permute(1, 2, 0).numpy())


def test_points_are_written_as_tensors_of_their_own_size(tmp_path):
    module = tiny.gan()
    _predict(tmp_path, module, tiny.ring(num_predict_samples=4))
    points = [torch.load(tmp_path / "predictions" / f"{i:06d}.pt", weights_only=True) for i in range(4)]
    torch.testing.assert_close(torch.stack(points), module.sample(4, generator=sample_generators(0, 4)))
    assert all(point.untyped_storage().nbytes() == 2 * 4 for point in points)


def test_files_go_to_the_folder_asked_for(tmp_path):
    _predict(tmp_path, tiny.vae(), tiny.digits(num_predict_samples=2), SampleWriter(str(tmp_path / "a" / "b")))
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["000000.png", "000001.png"]
    assert not (tmp_path / "predictions").exists()


def test_files_go_to_the_runs_folder_where_there_is_one(tmp_path):
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name="runs", version="one")
    _predict(tmp_path, tiny.vae(), tiny.digits(num_predict_samples=1), logger=logger)
    assert os.listdir(tmp_path / "runs" / "one" / "predictions") == ["000000.png"]


def test_what_is_written_does_not_depend_on_the_batch_size(tmp_path):
    for size in (2, 5):
        data = tiny.digits(num_predict_samples=5, eval_batch_size=size)
        _predict(tmp_path, tiny.vae(), data, SampleWriter(str(tmp_path / str(size))))
    for i in range(5):
        two, five = (np.asarray(Image.open(tmp_path / size / f"{i:06d}.png")) for size in "25")
        np.testing.assert_allclose(two.astype(int), five.astype(int), atol=1)


def test_samples_come_from_the_averaged_weights(tmp_path):
    ema, module = EMA(half_life=1e6, ramp_up=1e9), tiny.gan()
    writer = SampleWriter()
    fitted = tiny.train(tmp_path, module, tiny.ring(num_predict_samples=1), callbacks=[ema, writer], max_steps=5)
    fitted.predict(module, tiny.ring(num_predict_samples=1))
    written = torch.load(tmp_path / "predictions" / "000000.pt", weights_only=True)
    live = module.sample(1, generator=sample_generators(0, 1))[0]
    with ema.averaged():
        averaged = module.sample(1, generator=sample_generators(0, 1))[0]
    torch.testing.assert_close(written, averaged)
    assert not torch.equal(written, live)


def test_more_samples_than_indices_are_refused(tmp_path):
    writer, trainer = SampleWriter(str(tmp_path)), tiny.trainer(tmp_path)
    writer.setup(trainer, tiny.gan(), "predict")
    with pytest.raises(ValueError, match="zip"):
        writer.write_on_batch_end(trainer, tiny.gan(), torch.zeros(3, 2), None, torch.arange(2), 0, 0)
