"""Pictures of a class, drawn once by a pretrained pipeline before it is tuned.

Source: Ruiz et al. 2023, DreamBooth (arXiv:2208.12242), sec. 3.3, prior preservation.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from tqdm import tqdm

from lit_generative.data.captioned_images import images_in
from lit_generative.data.image_files import find_images, shown
from lit_generative.tensor_ops import derive_seed

RECORD = ".class_images.json"
"""Beside the pictures: the prompt and the pipeline that they were drawn with."""


class ClassImages:
    """A folder of pictures of one class, which a pipeline of diffusers fills.

    Args:
        who: Named in messages.
        folder: The folder; it is made if needed.
        prompt: What the pictures show.
        num: How many there shall be; 0 for as many as there are.
        pretrained: The pipeline, on the hub or in a folder; None draws nothing.
        revision: Commit, branch or tag on the hub; None for its main branch.
        steps: Steps of the sampler; None for the pipeline's own number.
        guidance: How much the prompt counts; None for the pipeline's own scale.
        batch_size: How many pictures are drawn at a time.
        seed: Picture ``i`` is a function of it, ``i`` and the prompt.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        who: str,
        folder: str,
        prompt: str,
        num: int = 0,
        pretrained: str | None = None,
        revision: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("num_class_images", num, 0), ("class_batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{who}: {name} must be at least {least}, got {value}.")
        if steps is not None and steps < 1:
            raise ValueError(f"{who}: class_steps must be at least 1, got {steps}.")
        self.who, self.folder, self.prompt, self.num = who, folder, prompt, num
        self.pretrained, self.revision, self.steps, self.guidance = pretrained, revision, steps, guidance
        self.batch_size, self.seed = batch_size, seed

    def prepare(self) -> None:
        """Draw what is missing; nothing is drawn again, and no picture is changed.

        Raises:
            ValueError: If some are missing and there is no pipeline, or it cannot be loaded, or the pictures were
                drawn with another one or of another prompt.
        """
        self._check_record()
        missing = self.num - (len(find_images(self.folder)) if os.path.isdir(self.folder) else 0)
        if missing <= 0:
            return
        if self.pretrained is None:
            raise ValueError(
                f"{self.who}: {shown(self.folder)} must hold {self.num} pictures of the class, and {missing} are "
                "missing. Add some, lower num_class_images, or set pretrained to the pipeline that shall draw them."
            )
        numbers = [i for i in range(self.num) if not self._path(i).exists()][:missing]
        with isolate_rng():
            self._draw(_pipeline(self.who, self.pretrained, self.revision), numbers)

    def paths(self) -> list[str]:
        """Files of the pictures.

        Raises:
            ValueError: If there are too few.
        """
        names = images_in(self.who, self.folder)
        if len(names) < self.num:
            raise ValueError(
                f"{self.who}: {shown(self.folder)} must hold {self.num} pictures of the class, got {len(names)}. Call "
                "prepare_data() first; the Trainer does."
            )
        return [os.path.join(self.folder, name) for name in names[: self.num or None]]

    def _draw(self, pipeline: Any, numbers: list[int]) -> None:
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        record = json.dumps({"prompt": self.prompt, "pretrained": self.pretrained})
        (Path(self.folder) / RECORD).write_text(record, encoding="utf-8")
        options = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        options = {name: value for name, value in options.items() if value is not None}
        with tqdm(desc="drawing the class", total=len(numbers), unit=" images") as bar:
            for start in range(0, len(numbers), self.batch_size):
                part = numbers[start : start + self.batch_size]
                seeds = [derive_seed("class", self.prompt, self.seed, i) for i in part]
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                images = pipeline([self.prompt] * len(part), generator=generators, **options).images
                for i, image in zip(part, images, strict=True):
                    self._save(i, image)
                bar.update(len(part))

    def _save(self, i: int, image: Any) -> None:
        path = self._path(i)
        unfinished = path.with_name(f".{path.name}")  # hidden, so that a broken-off one is never taken for a picture
        image.save(unfinished, format="PNG")
        unfinished.replace(path)

    def _path(self, i: int) -> Path:
        return Path(self.folder) / f"class_{i:05d}.png"

    def _check_record(self) -> None:
        path = Path(self.folder) / RECORD
        if not path.exists():
            return  # pictures of the user's own
        drawn = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"prompt": self.prompt, "pretrained": self.pretrained or drawn["pretrained"]}
        changed = [f"{key} {drawn[key]!r} and not {value!r}" for key, value in wanted.items() if drawn[key] != value]
        if changed:
            raise ValueError(
                f"{self.who}: the pictures in {shown(self.folder)} were drawn with {'; '.join(changed)}. Give another "
                "class_dir, or remove the folder to have them drawn anew."
            )


def _pipeline(who: str, pretrained: str, revision: str | None) -> Any:
    """A silent pipeline on the best device."""
    from diffusers import DiffusionPipeline  # slow to import, and only needed here

    try:
        pipeline = DiffusionPipeline.from_pretrained(
            pretrained,
            revision=revision,
            use_safetensors=True,  # pickled weights could run code
            low_cpu_mem_usage=False,  # else it asks for accelerate
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{who}: {pretrained!r} could not be loaded: {' '.join(str(error).split())[:200]} Give the name of a "
            "pipeline on the hub, or a folder that holds model_index.json."
        ) from error
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it would put black squares among the pictures that are learned
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
