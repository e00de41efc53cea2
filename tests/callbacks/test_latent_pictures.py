"""The three pictures show what they say, at each validation, and training does not notice."""

from __future__ import annotations

import functools

import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.latent_pictures import LatentPictures
from lit_generative.pictures import grid
from lit_generative.tensor_ops import from_uint8
from lit_generative.training.csv_logger import CSVLogger
from tests import families, tiny
from tests.vae.test_adversarial_module import model
from tests.vae.test_module_options import conditional

NAMES = ("reconstructions", "interpolations", "traversals")


class Identity:
    """An image of 1x1x2 pixels is its own code."""

    num_classes = None

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean = x.flatten(start_dim=1)
        return mean, torch.tensor([0.0, -4.0]).expand_as(mean)  # the second unit has the larger KL

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x.flatten(start_dim=1)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return z.reshape(-1, 1, 1, 2)


class IdentityOfMaps(Identity):
    """It is its own code, and keeps its shape."""

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x


class Halved(Identity):
    """A model with a flow, which halves what the encoder gave."""

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return 0.5 * super().encode(x, y)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return super().decode(2 * z, y)


def test_each_picture_by_hand():
    x = torch.tensor([[-1.0, 0.5], [0.0, 1.0]]).reshape(2, 1, 1, 2)
    pictures = LatentPictures(num_columns=3, num_units=1).draw(Identity(), x, None)
    tiny.assert_same(pictures["reconstructions"], grid(torch.cat([x, x]), columns=2))
    way = torch.tensor([[-1.0, 0.5], [-0.5, 0.75], [0.0, 1.0], [0.0, 1.0], [-0.5, 0.75], [-1.0, 0.5]])
    tiny.assert_same(pictures["interpolations"], grid(way.reshape(6, 1, 1, 2), columns=3))
    turned = torch.tensor([[-1.0, -3.0], [-1.0, 0.0], [-1.0, 3.0]])
    tiny.assert_same(pictures["traversals"], grid(turned.reshape(3, 1, 1, 2), columns=3))


def test_a_map_has_no_unit_that_could_be_turned_and_is_else_drawn_like_a_vector():
    x = torch.rand(3, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    vectors, maps = (LatentPictures(num_columns=4).draw(model, x, None) for model in (Identity(), IdentityOfMaps()))
    assert set(vectors) - set(maps) == {"traversals"}
    tiny.assert_same(maps, {name: vectors[name] for name in maps})


def test_codes_are_those_that_the_decoder_takes():
    x = torch.tensor([[-0.4, 0.5], [0.0, 1.0]]).reshape(2, 1, 1, 2)
    callback = LatentPictures(num_columns=3, num_units=1)
    plain, halved = (callback.draw(model, x, None) for model in (Identity(), Halved()))
    for name in ("reconstructions", "interpolations"):
        tiny.assert_same(halved[name], plain[name])
    turned = torch.tensor([[-0.4, -6.0], [-0.4, 0.0], [-0.4, 6.0]])
    tiny.assert_same(halved["traversals"], grid(turned.reshape(3, 1, 1, 2), columns=3))


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (tiny.vae, NAMES),
        (conditional, NAMES),
        (functools.partial(model, "vectors"), NAMES),
        (functools.partial(model, "maps"), NAMES[:2]),
    ],
)
def test_each_validation_writes_them_and_changes_no_weight(tmp_path, build, names):
    options = {"max_steps": 2, "val_check_interval": 1, "limit_val_batches": 2}
    bare, drawn = build(), build()
    tiny.train(tmp_path / "a", bare, tiny.digits(), callbacks=[EMA(half_life=10)], **options)
    logger = CSVLogger(str(tmp_path), name="run", version="0")
    callbacks = [EMA(half_life=10), LatentPictures(num_images=4, num_columns=5, num_units=2)]
    tiny.train(tmp_path / "b", drawn, tiny.digits(), callbacks=callbacks, logger=logger, **options)
    tiny.assert_same(tiny.weights(drawn), tiny.weights(bare))
    folder = tmp_path / "run" / "0" / "samples"
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(
        f"{name}_{step:07d}.png" for name in names for step in (1, 2)
    )
    sizes = {name: Image.open(folder / f"{name}_0000002.png").size for name in names}
    assert sizes["reconstructions"][0] > sizes["reconstructions"][1]  # four columns, two rows
    assert sizes["interpolations"][0] > sizes["interpolations"][1]  # five columns, four rows


def test_a_vqvae_has_its_reconstructions_drawn_alone():
    module = families.build("vqvae")
    x = from_uint8(torch.randint(256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0)))
    pictures = LatentPictures(num_images=3).draw(module, x, torch.zeros(3, dtype=torch.int64))
    assert pictures.keys() == {"reconstructions"}
    expected = grid(torch.cat([x, module.reconstruct(x)]), columns=3)
    torch.testing.assert_close(pictures["reconstructions"], expected, rtol=0, atol=0)


def test_a_module_without_codes_is_refused(tmp_path):
    with pytest.raises(TypeError, match="LatentPictures: GAN does not encode and decode images"):
        tiny.train(tmp_path, tiny.gan(), tiny.ring(), callbacks=[LatentPictures()])


@pytest.mark.parametrize(("name", "least"), [("num_images", 1), ("num_columns", 2), ("num_units", 1)])
def test_numbers_that_leave_no_picture_are_refused(name, least):
    with pytest.raises(ValueError, match=f"LatentPictures: {name} must be at least {least}, got {least - 1}"):
        LatentPictures(**{name: least - 1})
