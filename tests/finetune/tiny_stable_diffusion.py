"""Write a tiny Stable Diffusion to a folder: every layer of the published ones, narrow, and nothing is downloaded.

Weights are random. With ``--pretrain`` the model learns a small world of coloured shapes with captions, in about ten
minutes on one core, and then knows something that fine-tuning can build on.

    python tests/finetune/tiny_stable_diffusion.py FOLDER [--kind sd|sd-v|sdxl] [--pretrain]

``make(folder, "sd-v", world=SMALL)`` with ``teach(..., vae_steps=400, unet_steps=1000)`` takes about a minute. That it
predicts the velocity matters: at high noise, where colour is decided, the error of epsilon is next to nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

KINDS = ("sd", "sd-v", "sdxl")
COLORS = {"red": (0.7, -0.7, -0.7), "green": (-0.7, 0.4, -0.4), "blue": (-0.6, -0.4, 0.7), "yellow": (0.8, 0.6, -0.6)}
BACKGROUNDS = {"white": 0.9, "black": -0.9}
WORDS = ("a painting of", "in the style of", "sks", "toy", "dog", "cat", "with")


class World(NamedTuple):
    """What there is to see and to say."""

    size: int = 32
    """Height and width in pixels."""
    shapes: tuple[str, ...] = ("circle", "square", "triangle")
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    caption: str = "a photo of a {color} {shape} on a {background} background"
    max_length: int = 77
    """Tokens of a prompt."""
    word_scale: float | None = None
    """Standard deviation of the words' vectors at the start; none is CLIP's 0.02, which takes long to tell apart."""
    vae_rate: float = 1.5e-3


WORLD = World()
SMALL = World(16, ("circle", "square"), ("white",), "a photo of a {color} {shape}", 16, 1.0, 4e-3)


def make(folder: str | Path, kind: str = "sd", seed: int = 0, pretrain: bool = False, world: World = WORLD) -> Any:
    """Save a pipeline, and give it.

    Args:
        folder: Where to.
        kind: ``sd``, ``sd-v`` (the same, predicting the velocity) or ``sdxl``.
        seed: Of the weights.
        pretrain: Teach it the world of shapes; not for ``sdxl``.
        world: Which shapes.
    """
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(  # three levels instead of four: latents of 8 x 8
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=world.size,
    )
    prediction = "v_prediction" if kind == "sd-v" else "epsilon"
    parts = {"vae": vae, **(_xl_parts(world) if kind == "sdxl" else _parts(world, prediction))}
    if kind == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        pipeline = diffusers.StableDiffusionPipeline(**parts, **unused, requires_safety_checker=False)
    if pretrain:
        teach(pipeline, world)
    pipeline.save_pretrained(folder)
    return pipeline


def pictures(
    num: int, seed: int = 0, colors: tuple[str, ...] = tuple(COLORS), world: World = WORLD
) -> tuple[Tensor, list[str]]:
    """Shapes in any place and size: ``(num, 3, size, size)`` in ``[-1, 1]``, and captions."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: Any) -> Any:
        return list(options)[int(torch.randint(len(options), (), generator=generator))]

    images, captions = [], []
    rows, columns = torch.meshgrid(torch.arange(world.size), torch.arange(world.size), indexing="ij")
    for _ in range(num):
        color, shape, background = pick(colors), pick(world.shapes), pick(world.backgrounds)
        radius = int(torch.randint(world.size * 6 // 32, -(-world.size * 11 // 32), (), generator=generator))
        y, x = torch.randint(radius, world.size - radius, (2,), generator=generator)
        down, right = (rows - y) / radius, (columns - x) / radius
        inside = {
            "circle": down.square() + right.square() <= 1,
            "square": torch.maximum(down.abs(), right.abs()) <= 1,
            "triangle": (down.abs() <= 1) & (right.abs() <= (down + 1) / 2),
        }[shape]
        images.append(torch.where(inside, torch.tensor(COLORS[color])[:, None, None], BACKGROUNDS[background]))
        captions.append(world.caption.format(color=color, shape=shape, background=background))
    return torch.stack(images), captions


def _parts(world: World, prediction: str) -> dict[str, Any]:
    tokenizer = _tokenizer("<|endoftext|>", world)
    settings = {**_schedule(prediction), "set_alpha_to_one": False}
    if prediction == "epsilon":
        scheduler: Any = diffusers.PNDMScheduler(skip_prk_steps=True, **settings)
    else:
        scheduler = diffusers.DDIMScheduler(clip_sample=False, **settings)
    unet = diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        **_unet(world),
    )
    encoder = _encoder(CLIPTextModel, tokenizer, "quick_gelu", world)
    return {"tokenizer": tokenizer, "text_encoder": encoder, "unet": unet, "scheduler": scheduler}


def _xl_parts(world: World) -> dict[str, Any]:
    tokenizer, tokenizer_2 = _tokenizer("<|endoftext|>", world), _tokenizer("!", world)
    unet = diffusers.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        **_unet(world),
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": _encoder(CLIPTextModel, tokenizer, "quick_gelu", world),
        "text_encoder_2": _encoder(CLIPTextModelWithProjection, tokenizer_2, "gelu", world),
        "unet": unet,
        "scheduler": diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **_schedule("epsilon")),
    }


def _unet(world: World) -> dict[str, Any]:
    return {
        "sample_size": world.size // 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "block_out_channels": (32, 64),
    }


def _schedule(prediction: str) -> dict[str, Any]:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return {"num_train_timesteps": 1000, "prediction_type": prediction, "steps_offset": 1, **betas}


def _encoder(cls: Any, tokenizer: Any, activation: str, world: World) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=world.max_length,
        hidden_size=32,
        intermediate_size=128,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=32,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # the old value 2 pools at the largest id: at a token that was added
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = cls(config).eval()
    if world.word_scale is not None:
        torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=world.word_scale)
    return encoder


def _captions(world: World) -> Iterator[str]:
    for color, shape, background in itertools.product(COLORS, world.shapes, world.backgrounds):
        yield world.caption.format(color=color, shape=shape, background=background)
    yield from WORDS


def _tokenizer(pad_token: str, world: World) -> Any:
    """Byte pairs as CLIP has them: 256 bytes, the same at a word's end, merges, and the two special tokens last."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + 200,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_captions(world), trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    names = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=world.max_length)


def teach(
    pipeline: Any,
    world: World = WORLD,
    vae_steps: int = 800,
    unet_steps: int = 1500,
    num: int = 512,
    batch_size: int = 32,
) -> None:
    """Teach the world of shapes: first the autoencoder, then U-Net and text encoder, ``batch_size`` at a time."""
    images, captions = pictures(num, world=world)
    generator = torch.Generator().manual_seed(0)
    _teach_vae(pipeline.vae, images, vae_steps, world.vae_rate, generator)
    with torch.no_grad():
        latents = torch.cat([pipeline.vae.encode(part).latent_dist.mean for part in images.split(64)])
    pipeline.vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    latents *= pipeline.vae.config.scaling_factor
    settings = {"padding": "max_length", "max_length": world.max_length, "return_tensors": "pt"}
    ids = pipeline.tokenizer([*captions, ""], **settings).input_ids
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    parameters = [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, unet_steps)
    average = diffusers.training_utils.EMAModel(parameters, decay=0.995)
    for _ in range(unet_steps):
        i = torch.randint(num, (batch_size,), generator=generator)
        eps = torch.randn(latents[i].shape, generator=generator)
        t = torch.randint(1000, (batch_size,), generator=generator)
        hidden = torch.rand(batch_size, generator=generator) < 0.1  # what guidance needs
        text = pipeline.text_encoder(ids[torch.where(hidden, num, i)])[0]
        v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents[i], eps, t) if v else eps
        output = pipeline.unet(scheduler.add_noise(latents[i], eps, t), t, text).sample
        _step((output - target).square().mean(), parameters, optimizer, rates)
        average.step(parameters)
    average.copy_to(parameters)


def _teach_vae(vae: Any, images: Tensor, steps: int, rate: float, generator: torch.Generator) -> None:
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(steps):
        x = images[torch.randint(len(images), (16,), generator=generator)]
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample(generator)).sample - x).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        _step(error + 1e-4 * kl, parameters, optimizer, rates)


def _step(loss: Tensor, parameters: list[Any], optimizer: Any, rates: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    rates.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--kind", choices=KINDS, default="sd")
    parser.add_argument("--pretrain", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipeline = make(args.folder, args.kind, args.seed, args.pretrain)
    sizes = {k: sum(p.numel() for p in m.parameters()) for k, m in pipeline.components.items() if hasattr(m, "modules")}
    print(sizes)


if __name__ == "__main__":
    main()
