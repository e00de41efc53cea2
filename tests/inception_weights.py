"""A file of random weights for Inception-V3: the published one is 96 MB and not ours to ship."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_generative.metrics.inception import _blank


def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, made once a session; workers of xdist share it."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path = folder / "inception-random.pth"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(random_weights(), unfinished)
        unfinished.replace(path)  # at once: another worker may be looking
    return path


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of He's variance, and batch norm fitted to four images, so that features neither vanish nor explode."""
    net = _blank().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(generator=generator).mul_((2 / module.weight[0].numel()) ** 0.5)
    nn.init.uniform_(net.fc.bias, generator=generator)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over batches, of which there is one
        nn.init.uniform_(norm.weight, 0.8, 1.2, generator=generator)
        nn.init.uniform_(norm.bias, -0.2, 0.2, generator=generator)
        norm.train()
    net(pictures(4, generator))
    return {key: value.clone() for key, value in net.state_dict().items()}


def pictures(num: int, generator: torch.Generator) -> torch.Tensor:
    """Colour images of blobs of several sizes, uint8 ``(num, 3, 32, 32)``."""
    coarse = [torch.rand(num, 3, size, size, generator=generator) for size in (2, 4, 8, 16)]
    fine = sum(nn.functional.interpolate(x, size=32, mode="bicubic") for x in coarse) / len(coarse)
    return fine.sub(0.2).mul(425).clamp(0, 255).to(torch.uint8)
