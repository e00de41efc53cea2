"""Vector-quantized variational autoencoders (van den Oord, Vinyals & Kavukcuoglu 2017, arXiv:1711.00937)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.metrics.code_usage import CodePerplexity
from lit_generative.tensor_ops import Generators, evaluating, sum_per_example, to_float32
from lit_generative.training.labels import labels_of
from lit_generative.training.module import GenerativeModule
from lit_generative.types import Batch
from lit_generative.vae.likelihoods import Likelihood, check_first, with_state


class VQVAE(GenerativeModule):
    """Encoder, codebook and decoder, and a prior over the grid of codes.

    The loss is eq. 3 with a codebook of running averages (app. A.1), which has no term of its own, plus the prior's
    negative log-likelihood of the codes::

        -log p(x | z_q) + beta * |z_e - z_q|**2 - log p(codes | y)

    In the paper the prior is fitted once the rest is trained; here it learns beside it, from codes that still change.
    Codes pass no gradient on, so the rest trains as it would alone. The second and third term do not scale with the
    likelihood: a Gaussian of smaller ``sigma`` weighs the first term more, and wants a larger ``beta``.

    The codebook is of buffers, and an average over its last ``1 / (1 - decay)`` updates already: leave the callbacks
    ``EMA`` and ``PostHocEMA`` at ``buffers: copy``, which evaluate averaged networks with the latest codebook. Averaged
    once more, a code that was placed anew lies between its two places; on digits after 300 updates the squared error
    was 12 % higher with ``EMA``, and 13 to 18 % with ``PostHocEMA``.

    Args:
        encoder: ``encoder(x)`` gives feature maps, ``(N, D, h, w)``.
        quantizer: ``quantizer(z_e)`` gives ``z_q``, ``codes``, ``commitment`` and ``perplexity``, ``lookup(codes)`` the
            maps of codes; has ``num_codes``.
        decoder: ``decoder(z_q)`` gives what the likelihood reads.
        prior: ``prior(codes, y)`` gives logits ``(N, K, h, w)``, ``sample(num, y, generator)`` codes ``(num, h, w)``;
            its classes are the model's.
        likelihood: Meaning of the decoder's output.
        optimizer: Optimizer of all of them.
        scheduler: Learning rate, stepped once an update.
        beta: Weight of the commitment term, nats per squared unit of the features.

    Raises:
        ValueError: If ``beta`` is negative, or the parts do not agree on ``dim``, ``grid_size`` or ``num_codes``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: nn.Module,
        decoder: nn.Module,
        prior: nn.Module,
        likelihood: Likelihood,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        beta: float = 0.25,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not 0 <= beta < math.inf:
            raise ValueError(f"VQVAE: beta must not be negative, got {beta}.")
        _check_agreement({"encoder": encoder, "quantizer": quantizer, "decoder": decoder, "prior": prior})
        self.num_classes = getattr(prior, "num_classes", None)
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        self.prior = prior
        self.likelihood = likelihood
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.beta = beta
        self.code_perplexity = CodePerplexity(int(quantizer.num_codes))  # type: ignore[arg-type]
        self._checked: set[str] = set()

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one image, if the decoder states it."""
        return getattr(self.decoder, "sample_shape", None)

    @property
    def sampling_modules(self) -> list[str]:
        """All that a sample or a reconstruction needs."""
        return ["encoder", "quantizer", "decoder", "prior", *with_state(self, "likelihood")]

    @override
    def configure_optimizers(self) -> Any:
        return self.optimizer_for("vqvae", self.parameters(), self.optimizer, self.scheduler)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms, quantized = self._terms("train", batch)
        self.log_losses({**terms, "perplexity": quantized.perplexity}, in_bar=("loss", "reconstruction", "perplexity"))
        return terms["loss"].mean()

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        terms, quantized = self._terms(stage, batch)
        self.log_evaluation(stage, terms)
        self.code_perplexity.update(quantized.codes)
        self.log(f"{stage}/perplexity", self.code_perplexity)  # Lightning computes it at the end, over all processes

    def _terms(self, stage: str, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        """The loss and what it is made of, each ``(N,)`` float32, and what the quantizer gave."""
        x, y = batch["image"], labels_of("VQVAE", batch, self.num_classes)
        check_first(self.likelihood, x, stage, self._checked)
        quantized = self.quantizer(self.encoder(x))
        reconstruction = -self.likelihood.log_prob(to_float32(self.decoder(quantized.z_q)), x)
        prior_nll = self.prior_nll(quantized.codes, y)
        loss = reconstruction + self.beta * quantized.commitment + prior_nll
        terms = {"reconstruction": reconstruction, "commitment": quantized.commitment, "prior_nll": prior_nll}
        return {"loss": loss, **terms}, quantized

    def prior_nll(self, codes: Tensor, y: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of grids of codes.

        Args:
            codes: ``(N, h, w)`` int64.
            y: Labels, ``(N,)`` int64, if the model has classes.

        Returns:
            Nats per example, ``(N,)``.
        """
        return sum_per_example(F.cross_entropy(to_float32(self.prior(codes, y)), codes, reduction="none"))

    @override
    @torch.no_grad()
    def sample(self, num: int, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Draw codes from the prior and give the expected image.

        Args:
            num: How many.
            label: ``(num,)`` classes; None draws them uniformly if the model has classes.
            generator: Source of the noise, see :func:`lit_generative.tensor_ops.randn`.

        Returns:
            ``(num, C, H, W)`` in ``[-1, 1]``, float32.
        """
        y = self.labels_for(num, label, generator)
        return self.decode(self.prior.sample(num, y, generator))  # type: ignore[operator]

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes ``(N, h, w)`` int64 of images ``(N, C, H, W)`` in ``[-1, 1]``."""
        with evaluating(self):
            codes: Tensor = self.quantizer(self.encoder(x)).codes
            return codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Expected images ``(N, C, H, W)`` in ``[-1, 1]`` of codes ``(N, h, w)``."""
        with evaluating(self):
            output = self.decoder(self.quantizer.lookup(codes))  # type: ignore[operator]
            return self.likelihood.mean(to_float32(output))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Images through the codebook and back, ``(N, C, H, W)`` in ``[-1, 1]``; only the prior knows labels ``y``."""
        return self.decode(self.encode(x))


def _check_agreement(parts: dict[str, nn.Module]) -> None:
    """What several parts state, they must state alike."""
    for name in ("dim", "grid_size", "num_codes"):
        stated = {part: getattr(module, name) for part, module in parts.items() if hasattr(module, name)}
        if len(set(stated.values())) > 1:
            values = ", ".join(f"{value} ({part})" for part, value in stated.items())
            raise ValueError(f"VQVAE: all parts must have the same {name}, got {values}.")
