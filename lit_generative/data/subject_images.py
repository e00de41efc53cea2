"""A few pictures of one subject, and pictures of its class that keep a model from forgetting what else there is.

Source: Ruiz et al. 2023, DreamBooth (arXiv:2208.12242), sec. 3.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import NotRequired, override

from lit_generative.data.batches import BatchDataset, BatchKey
from lit_generative.data.captioned_examples import CaptionedBatch, CaptionedDataModule, CaptionedExamples, View
from lit_generative.data.captioned_images import check_square, images_in
from lit_generative.data.class_images import ClassImages
from lit_generative.data.image_files import Background
from lit_generative.data.splits import Splits
from lit_generative.tensor_ops import derive_seed
from lit_generative.types import Split


class SubjectBatch(CaptionedBatch):
    """Pictures of the subject and, for prior preservation, of its class."""

    class_image: NotRequired[Tensor]
    """Images ``(M, 3, H, W)`` in ``[-1, 1]``, float32."""
    class_caption: NotRequired[list[str]]
    """``M`` times the prompt of the class."""


class Repeated(BatchDataset):
    """Pictures that each come several times in an epoch.

    Args:
        dataset: The pictures, each once.
        repeats: How often each comes.
    """

    def __init__(self, dataset: CaptionedExamples, repeats: int) -> None:
        self.dataset, self.repeats = dataset, repeats

    @override
    def __len__(self) -> int:
        return len(self.dataset) * self.repeats

    @override
    def __getitem__(self, key: BatchKey) -> CaptionedBatch:
        return self.dataset[key._replace(indices=key.indices % len(self.dataset))]


class WithClass(BatchDataset):
    """Adds to each batch as many pictures of the class, drawn at random: a function of the seed and the key.

    Args:
        dataset: The subject.
        class_examples: The class; in a batch none comes twice, unless there are fewer than a batch holds.
        seed: Two runs with the same seed draw the same.
    """

    def __init__(self, dataset: BatchDataset, class_examples: CaptionedExamples, seed: int) -> None:
        self.dataset, self.class_examples, self.seed = dataset, class_examples, seed

    @override
    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def __getitem__(self, key: BatchKey) -> SubjectBatch:
        seed = derive_seed("class", self.seed, key.epoch, key.batch, key.rank)
        order = torch.randperm(len(self.class_examples), generator=torch.Generator().manual_seed(seed))
        drawn = self.class_examples[key._replace(indices=order[torch.arange(len(key.indices)) % len(order)])]
        subject = cast(CaptionedBatch, self.dataset[key])
        return {**subject, "class_image": drawn["image"], "class_caption": drawn["caption"]}


class SubjectImages(CaptionedDataModule):
    """A few pictures of one subject, all with the same caption.

    A batch is ``{"image": (N, 3, H, W), "label": (N,), "caption": list of N}``. With ``class_prompt`` a training batch
    also holds ``"class_image"``, as many pictures of the class, drawn at random, and ``"class_caption"``. What
    ``class_dir`` lacks of them is drawn once by the pipeline ``pretrained``, before training: picture ``i`` is a
    function of the prompt, ``split_seed`` and ``i``, so that a broken-off drawing goes on.

    Validation is on the same pictures, from the middle and not mirrored: there are too few to keep some away. Where the
    noise is the same each time, its loss shows how well the subject is learned, and nothing of what is forgotten.

    Args:
        data_dir: Folder of the pictures.
        prompt: Caption of all of them: a rare word and the class, as in "a photo of a sks dog".
        image_size: Height and width in pixels: the shorter side is scaled (bilinear, antialiased), a square is cut.
        class_prompt: Caption of the class, as in "a photo of a dog"; None for no prior preservation.
        class_dir: Folder of its pictures; it is made if needed.
        num_class_images: How many of them there shall be, and are used; 0 for all that there are, and none is drawn.
        pretrained: A pipeline of diffusers, on the hub or in a folder: the base before it is tuned.
        revision: Commit, branch or tag on the hub; None for its main branch.
        class_steps: Steps of the sampler for a picture of the class; None for the pipeline's own number.
        class_guidance: How much the prompt counts for it; None for the pipeline's own scale.
        class_batch_size: How many of them are drawn at a time.
        repeats: How often each picture of the subject comes in an epoch.
        random_crop: Cut the square anywhere along the longer side in training; else from the middle.
        horizontal_flip: Mirror pictures of the subject with probability 1/2: not if there is writing on it.
        background: What shows through transparent pixels.
        kwargs: Arguments of :class:`~lit_generative.data.resumable.ResumableDataModule` but ``val_fraction``.

    Raises:
        ValueError: If an argument is out of its range, or ``class_prompt`` comes without ``class_dir`` or the other
            way round. When the pictures are looked for: if there are none, if some of the class are missing and there
            is no pipeline, or if they were drawn of another prompt or by another pipeline.
    """

    def __init__(
        self,
        data_dir: str,
        prompt: str,
        image_size: int = 512,
        class_prompt: str | None = None,
        class_dir: str | None = None,
        num_class_images: int = 0,
        pretrained: str | None = None,
        revision: str | None = None,
        class_steps: int | None = None,
        class_guidance: float | None = None,
        class_batch_size: int = 4,
        repeats: int = 100,
        random_crop: bool = False,
        horizontal_flip: bool = False,
        background: Background = "white",
        **kwargs: Any,
    ) -> None:
        super().__init__(val_fraction=0.0, **kwargs)
        check_square(self._name, image_size, background)
        if not prompt.strip():
            raise ValueError(f"{self._name}: prompt must say what the pictures show, got {prompt!r}.")
        if repeats < 1:
            raise ValueError(f"{self._name}: repeats must be at least 1, got {repeats}.")
        self.data_dir, self.prompt, self.image_size, self.background = data_dir, prompt, image_size, background
        self.repeats, self.random_crop, self.horizontal_flip = repeats, random_crop, horizontal_flip
        self.class_images: ClassImages | None = None
        if class_prompt is not None and class_dir is not None:
            drawn = (num_class_images, pretrained, revision, class_steps, class_guidance, class_batch_size)
            self.class_images = ClassImages(self._name, class_dir, class_prompt, *drawn, seed=self.split_seed)
        elif class_prompt is not None or class_dir is not None or num_class_images > 0:
            raise ValueError(
                f"{self._name}: pictures of the class need class_prompt and class_dir, got {class_prompt!r} and "
                f"{class_dir!r}. Give both, or neither and num_class_images 0 for no prior preservation."
            )

    def subject_pictures(self) -> Sequence[str | Tensor]:
        """Files of the pictures, or pixels ``(3, H, W)`` uint8."""
        return [os.path.join(self.data_dir, name) for name in images_in(self._name, self.data_dir)]

    @override
    def prepare_data(self) -> None:
        if self.class_images is not None:
            self.class_images.prepare()

    @override
    def load_splits(self) -> Splits:
        pictures = self.subject_pictures()
        captions = [self.prompt] * len(pictures)
        subject = CaptionedExamples(pictures, captions, self.image_size, self.background).held()
        return Splits(Repeated(subject, self.repeats), subject, subject.take(torch.zeros(0, dtype=torch.int64)))

    @override
    def augment(self, train: BatchDataset, seed: int) -> BatchDataset:
        subject = cast(Repeated, train).dataset.seen(View(seed, self.random_crop, self.horizontal_flip))
        repeated = Repeated(subject, self.repeats)
        if self.class_images is None:
            return repeated
        paths = self.class_images.paths()
        captions = [self.class_images.prompt] * len(paths)
        return WithClass(repeated, CaptionedExamples(paths, captions, self.image_size, self.background), seed)

    @override
    def num_examples(self, split: Split) -> int:
        """Number of pictures of a split, each counted once."""
        return super().num_examples("val" if split == "train" else split)
