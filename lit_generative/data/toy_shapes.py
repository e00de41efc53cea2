"""Coloured shapes with captions, drawn when they are asked for: a world small enough to fine-tune in, offline."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from typing_extensions import override

from lit_generative.data.batches import BatchDataset
from lit_generative.data.captioned_examples import CaptionedDataModule, CaptionedExamples, View
from lit_generative.data.captioned_images import split_examples
from lit_generative.data.splits import Splits, check_fraction
from lit_generative.data.subject_images import SubjectImages
from lit_generative.tensor_ops import derive_seed

Colour = Literal["red", "green", "blue", "yellow"]
Shape = Literal["circle", "square", "triangle"]
Ground = Literal["white", "black"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 50),
}
GROUNDS: dict[str, tuple[int, int, int]] = {"white": (245, 245, 245), "black": (15, 15, 15)}
LEAST_SIZE = 8


class ToyShapes(CaptionedDataModule):
    """Shapes of four colours on white or black, with captions.

    Place and size vary. Which pictures there are depends on ``split_seed`` alone. A batch is that of
    :class:`~lit_generative.data.captioned_images.CaptionedImages`.

    Args:
        num_images: How many pictures, all splits together.
        image_size: Height and width in pixels, at least 8.
        colours: Which colours are drawn, all alike often.
        shapes: Which shapes.
        grounds: Which backgrounds.
        caption: Template of the captions; ``{colour}``, ``{shape}`` and ``{ground}`` stand for what is drawn. What it
            leaves out is what a model has to learn of its other words, as in "a painting of a {shape}".
        horizontal_flip: Mirror training images with probability 1/2.
        test_fraction: Part of all images to test on, in ``[0, 1)``. ``val_fraction`` is taken from the rest.
        kwargs: Arguments of :class:`~lit_generative.data.resumable.ResumableDataModule`.

    Raises:
        ValueError: If a number is out of its range, a colour, shape or background unknown, or the template
            names anything else.
    """

    def __init__(
        self,
        num_images: int = 512,
        image_size: int = 32,
        colours: list[Colour] | None = None,
        shapes: list[Shape] | None = None,
        grounds: list[Ground] | None = None,
        caption: str = "a photo of a {colour} {shape} on a {ground} background",
        horizontal_flip: bool = False,
        test_fraction: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_drawing(self._name, num_images, image_size)
        check_fraction(self._name, "test_fraction", test_fraction)
        check_template(self._name, caption)
        self.num_images, self.image_size, self.caption = num_images, image_size, caption
        self.horizontal_flip, self.test_fraction = horizontal_flip, test_fraction
        self.colours = chosen(self._name, "colours", colours, get_args(Colour))
        self.shapes = chosen(self._name, "shapes", shapes, get_args(Shape))
        self.grounds = chosen(self._name, "grounds", grounds, get_args(Ground))

    @override
    def load_splits(self) -> Splits:
        pictures, captions = [], []
        for i in range(self.num_images):
            rng = np.random.default_rng(derive_seed("toy shape", self.split_seed, i))
            colour, shape, ground = (str(rng.choice(kinds)) for kinds in (self.colours, self.shapes, self.grounds))
            pictures.append(draw_shape(colour, shape, ground, self.image_size, rng))
            captions.append(self.caption.format(colour=colour, shape=shape, ground=ground))
        everything = CaptionedExamples(pictures, captions, self.image_size)
        return split_examples(everything, self.test_fraction, self.val_fraction, self.split_seed)

    @override
    def augment(self, train: BatchDataset, seed: int) -> BatchDataset:
        return cast(CaptionedExamples, train).seen(View(seed, horizontal_flip=self.horizontal_flip))


class ToySubject(SubjectImages):
    """Pictures of one shape in one colour, as of a thing that a user owns; place and size vary.

    Args:
        num_images: How many pictures.
        image_size: Height and width in pixels, at least 8.
        colour: Its colour.
        shape: What it is.
        ground: The background.
        prompt: Caption of all of them: not what the pictures show, but the name that training gives it.
        kwargs: Arguments of :class:`~lit_generative.data.subject_images.SubjectImages` but ``data_dir``.

    Raises:
        ValueError: If a number is out of its range, or a colour, shape or background unknown.
    """

    def __init__(
        self,
        num_images: int = 4,
        image_size: int = 32,
        colour: Colour = "green",
        shape: Shape = "circle",
        ground: Ground = "white",
        prompt: str = "a photo of a sks circle",
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir="", prompt=prompt, image_size=image_size, **kwargs)
        check_drawing(self._name, num_images, image_size)
        self.num_images = num_images
        (self.colour,) = chosen(self._name, "colour", [colour], get_args(Colour))
        (self.shape,) = chosen(self._name, "shape", [shape], get_args(Shape))
        (self.ground,) = chosen(self._name, "ground", [ground], get_args(Ground))

    @override
    def subject_pictures(self) -> list[Tensor]:
        return [
            draw_shape(
                self.colour,
                self.shape,
                self.ground,
                self.image_size,
                np.random.default_rng(derive_seed("toy subject", self.split_seed, i)),
            )
            for i in range(self.num_images)
        ]


def draw_shape(colour: str, shape: str, ground: str, size: int, rng: np.random.Generator) -> Tensor:
    """One picture of a circle, a square or a triangle, wholly within it.

    Args:
        colour: Key of :data:`COLOURS`.
        shape: "circle", "square" or "triangle".
        ground: Key of :data:`GROUNDS`.
        size: Height and width in pixels.
        rng: Place, and radius from a fifth to a third of ``size``.

    Returns:
        uint8, ``(3, size, size)``.
    """
    image = Image.new("RGB", (size, size), GROUNDS[ground])
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    radius = int(rng.integers(size // 5, size // 3))
    x, y = (int(n) for n in rng.integers(radius, size - radius, size=2))
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if shape == "circle":
        pen.ellipse([left, top, right, bottom], fill=fill)
    elif shape == "square":
        pen.rectangle([left, top, right, bottom], fill=fill)
    else:
        pen.polygon([(left, bottom), (right, bottom), (x, top)], fill=fill)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def chosen(who: str, name: str, kinds: Any, known: tuple[str, ...]) -> list[str]:
    """Kinds to draw; all that are known if none are given.

    Raises:
        ValueError: If one of them is unknown, or the list is empty.
    """
    if kinds is None:
        return list(known)
    if not kinds or not set(kinds) <= set(known):
        raise ValueError(f"{who}: {name} must be of {', '.join(known)}, got {kinds}.")
    return list(kinds)


def check_template(who: str, caption: str) -> None:
    """Refuse a template that names anything but a colour, a shape and a background.

    Raises:
        ValueError: If it does, or is none.
    """
    try:
        caption.format(colour="", shape="", ground="")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{who}: caption may name {{colour}}, {{shape}} and {{ground}} alone, got {caption!r}."
        ) from error


def check_drawing(who: str, num_images: int, image_size: int) -> None:
    """Refuse to draw nothing, or on too few pixels.

    Raises:
        ValueError: If there is no picture, or its side is below 8 pixels.
    """
    if num_images < 1:
        raise ValueError(f"{who}: num_images must be at least 1, got {num_images}.")
    if image_size < LEAST_SIZE:
        raise ValueError(f"{who}: image_size must be at least {LEAST_SIZE} to draw a shape, got {image_size}.")
