"""Fine-tuning modules on the tiny Stable Diffusion, and data for them."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
import torch
from peft import LoraConfig

from lit_generative.finetune.options import Sampling
from lit_generative.finetune.text_to_image import TextToImage
from lit_generative.finetune.textual_inversion import TextualInversion
from lit_generative.tensor_ops import sample_generators
from tests.finetune.tiny_stable_diffusion import pictures
from tests.tiny import trainer

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)
LORA = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
TEXT_LORA = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"])


def text_to_image(folder: str, seed: int = 0, **kwargs: Any) -> TextToImage:
    """LoRA in the U-Net, 3 sampling steps, one prompt; ``kwargs`` replace arguments."""
    torch.manual_seed(seed)
    arguments = {"optimizer": ADAMW, "adapter": LORA, "sampling": Sampling(["a red circle"], num_steps=3)}
    return TextToImage(folder, **(arguments | kwargs))


def textual_inversion(folder: str, **kwargs: Any) -> TextualInversion:
    """Two vectors for ``<it>``."""
    arguments = {"token": "<it>", "initializer": "toy", "num_vectors": 2, "sampling": Sampling(num_steps=3)}
    return TextualInversion(
        folder, functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0), **(arguments | kwargs)
    )


def batch(num: int = 3, seed: int = 0, caption: str | None = None, prior: int = 0) -> dict[str, Any]:
    """Pictures and captions; with ``prior``, so many of a class."""
    images, captions = pictures(num, seed)
    result = {"image": images, "label": torch.zeros(num, dtype=torch.int64)}
    result["caption"] = captions if caption is None else [caption] * num
    if prior:
        result["class_image"], result["class_caption"] = pictures(prior, seed + 1)
    return result


def shaken(module: Any, scale: float = 0.1) -> Any:
    """The module, all that is trained of it moved: an adapter changes nothing before it was trained."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


class Losses(L.Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def fit(tmp_path: Any, module: Any, batches: list[Any], **kwargs: Any) -> tuple[L.Trainer, list[float]]:
    """Train on batches as they are, one epoch unless ``kwargs`` say otherwise; gives each step's loss."""
    losses = Losses()
    ckpt_path = kwargs.pop("ckpt_path", None)
    callbacks = [losses, *kwargs.pop("callbacks", [])]
    val = kwargs.pop("val", None)
    fitted = trainer(tmp_path, **({"max_epochs": 1, "callbacks": callbacks} | kwargs))
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)
    fitted.fit(
        module, loader, None if val is None else torch.utils.data.DataLoader(val, batch_size=None), ckpt_path=ckpt_path
    )
    return fitted, losses.values


def diffusers_draw(pipeline: Any, prompts: list[str], num_steps: int = 3, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    """Pictures in ``[-1, 1]`` that a pipeline of diffusers draws by DDIM."""
    from diffusers import DDIMScheduler

    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    generators = sample_generators(seed, len(prompts))
    arguments = {"num_inference_steps": num_steps, "guidance_scale": 7.5, "output_type": "pt"} | kwargs
    return pipeline(prompts, generator=generators, **arguments).images * 2 - 1
