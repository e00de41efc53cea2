"""Trains the small classifiers whose features score digits and clothes, and writes their weights.

Run: ``python benchmarks/train_feature_nets.py --out folder``. Digits come with scikit-learn; Fashion-MNIST is read from
``--fashion-dir`` (Debian: ``apt install dataset-fashion-mnist``). The published files lie in
``lit_generative/metrics/weights``. Do not replace them: scores of another training run are another quantity.

A net is trained on all but the test images of our data module's default split, shifted by up to one or two pixels.
Half of the batches went through the sizes that configs train with (digits stretched to 16 x 16, clothes padded to
32 x 32) and back as the extractor does it, so that the net knows both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lit_generative.data.digits import Digits
from lit_generative.data.image_data import ImageDataModule
from lit_generative.data.mnist import FashionMNIST
from lit_generative.metrics.resizing import AntialiasResize
from lit_generative.metrics.small_nets import SmallNet

DEBIAN = "/usr/share/datasets/fashion-mnist"


class Recipe(NamedTuple):
    """How a net is trained."""

    data_set: str
    data: type[ImageDataModule]
    arguments: dict[str, Any]
    view: dict[str, Any]
    """Second way to see the images: arguments of the data module."""
    image_size: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    shift: int
    """Pixels a batch is moved by at most, in either direction."""


RECIPES = {
    "digits": Recipe(
        "scikit-learn digits", Digits, {}, {"image_size": 16, "resize": "stretch"}, 8, 80, 64, 3e-3, 1e-3, shift=1
    ),
    "fashion": Recipe(
        "Fashion-MNIST", FashionMNIST, {"download": False}, {"image_size": 32}, 28, 10, 128, 4e-3, 1e-2, shift=2
    ),
}


class Part(NamedTuple):
    """Images as the net sees them."""

    views: list[Tensor]
    """Each ``(N, 1, image_size, image_size)``, levels 0 to 255: the native images, and the second view."""
    labels: Tensor
    """int64, ``(N,)``."""


def load(recipe: Recipe, arguments: dict[str, Any]) -> tuple[Part, Part]:
    """Training images (with those for validation) and test images."""
    train, test = [], []
    for view in ({}, recipe.view):
        splits: Any = recipe.data(**recipe.arguments, **arguments, **view).load_splits()
        images = [AntialiasResize()(part.image, recipe.image_size) for part in splits]
        train.append(torch.cat(images[:2]))
        test.append(images[2])
        labels = [part.label for part in splits]
    return Part(train, torch.cat(labels[:2])), Part(test, labels[2])


def fit(recipe: Recipe, part: Part, seed: int) -> SmallNet:
    """Train with AdamW and one cycle of the learning rate."""
    torch.manual_seed(seed)
    net = SmallNet(recipe.image_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps_per_epoch = len(part.labels) // recipe.batch_size
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * steps_per_epoch)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(part.labels))[: steps_per_epoch * recipe.batch_size]
        for number, indices in enumerate(order.split(recipe.batch_size)):
            x = moved(part.views[number % 2][indices], recipe.shift)
            loss = F.cross_entropy(net(x).logits, part.labels[indices], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return net.eval().requires_grad_(False)


def moved(x: Tensor, most: int) -> Tensor:
    """Move a batch by a random number of pixels; what comes in is black."""
    dy, dx = torch.randint(2 * most + 1, (2,)).tolist()
    return F.pad(x, (most, most, most, most))[..., dy : dy + x.shape[-2], dx : dx + x.shape[-1]]


def round_and_scale(net: SmallNet, images: Tensor) -> None:
    """Round the weights to float16, as they are stored, then give each block of features a total variance of 1/2."""
    net.half().float()
    embedding = torch.cat([net(x).embedding for x in images.split(1000)]).double()
    means, hidden = embedding.var(dim=0).split([net.num_means, net.num_hidden])
    net.scale.copy_(torch.stack([0.5 / means.sum(), 0.5 / hidden.sum()]).sqrt())


def accuracy(net: SmallNet, images: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    logits = torch.cat([net(x).logits for x in images.split(1000)])
    return float((logits.argmax(dim=1) == labels).float().mean())


def train(name: str, arguments: dict[str, Any], seed: int, out: Path) -> list[float]:
    """Train one net, write its file, and return the accuracy on each view of the test images."""
    recipe = RECIPES[name]
    training, test = load(recipe, arguments)
    net = fit(recipe, training, seed)
    round_and_scale(net, training.views[0])
    scores = [accuracy(net, view, test.labels) for view in test.views]
    metadata = {
        "data_set": recipe.data_set,
        "split": f"{len(training.labels)} to train, {len(test.labels)} to test; data module {recipe.data.__name__}",
        "test_accuracy": f"{scores[0]:.4f}",
        "test_accuracy_second_view": f"{scores[1]:.4f}, {recipe.view}",
        "made_by": f"benchmarks/train_feature_nets.py --seed {seed}, torch {torch.__version__}",
    }
    weights = {key: value if key == "scale" else value.half() for key, value in net.state_dict().items()}
    save_file({key: value.contiguous() for key, value in weights.items()}, out / f"{name}.safetensors", metadata)
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    """Train and print the accuracies on images held out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--net", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--fashion-dir", default=DEBIAN)
    parser.add_argument("--out", type=Path, default=Path("outputs/feature_nets"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.net:
        arguments = {"data_dir": options.fashion_dir} if name == "fashion" else {}
        native, view = train(name, arguments, options.seed, options.out)
        print(f"{name}: held-out accuracy {native:.4f}, through {RECIPES[name].view} {view:.4f}", flush=True)


if __name__ == "__main__":
    main()
