import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from lit_generative.metrics.frechet import Frechet, FrechetInfinity
from lit_generative.metrics.generative_metrics import GenerativeMetrics
from lit_generative.metrics.inception_score import InceptionScore
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.mode_coverage import ModeCoverage
from lit_generative.metrics.precision_recall import PrecisionRecall
from tests.metrics.tiny_features import TinyFeatures

ALL = (Frechet(), FrechetInfinity(), Kernel(), InceptionScore(splits=3), PrecisionRecall(k=3), ModeCoverage())


def images(n: int, seed: int = 0, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, 6, 5), dtype=torch.uint8, generator=generator)


def metric(measures=ALL, **options) -> GenerativeMetrics:
    return GenerativeMetrics(TinyFeatures(), measures, **options)


def fed(measures=ALL, **options) -> GenerativeMetrics:
    result = metric(measures, **options)
    for real, x in ((True, images(40)), (False, images(33, seed=1))):
        for batch in x.split(12):
            result.update(batch, real=real)
    return result


def test_scores_are_those_of_the_measures_on_the_features():
    scores = fed().compute()
    names = ["fid", "fid_inf", "kid", "kid_se", "is", "is_std", "precision", "recall", "density", "coverage"]
    assert list(scores) == [*names, "modes", "mode_kl"] == [name for measure in ALL for name in measure.scores]
    assert all(type(value) is float for value in scores.values())
    x, y = (TinyFeatures().eval()(batch).embedding.double() for batch in (images(40), images(33, seed=1)))
    means = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    root = torch.linalg.eigvals(x.T.cov() @ y.T.cov()).sqrt().real.sum()
    expected = means + x.T.cov().trace() + y.T.cov().trace() - 2 * root
    assert scores["fid"] == pytest.approx(float(expected), rel=1e-9)


def test_any_order_with_places_scores_as_the_order_itself():
    shuffled = metric()
    for real, x in ((True, images(40)), (False, images(33, seed=1))):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
        for index in order.split(7):
            shuffled.update(x[index], real=real, index=index)
    assert shuffled.compute() == pytest.approx(fed().compute(), rel=1e-9)


def test_no_global_random_number_is_drawn():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    fed((Frechet(), Kernel(max_samples=10), InceptionScore(splits=3), PrecisionRecall(k=3))).compute()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize("x", [images(3).float(), images(3)[0], images(3, channels=2)])
def test_what_is_no_batch_of_pictures_is_refused(x):
    with pytest.raises(ValueError, match="GenerativeMetrics: need uint8 images"):
        metric().update(x, real=True)


def test_reset_forgets_both_sets():
    scored = fed()
    scored.compute()
    scored.reset()
    with pytest.raises(ValueError, match="got 0"), pytest.warns(UserWarning, match="before the ``update``"):
        scored.compute()


def test_reset_keeps_real_images_if_told_so():
    scored = fed(reset_real=False)
    expected = scored.compute()
    root = scored._real_set.moments.root
    scored.reset()
    scored.update(images(33, seed=1), real=False)
    assert scored.compute() == pytest.approx(expected, rel=1e-9)
    assert scored._real_set.moments.root is root


def test_real_images_that_come_after_a_score_count():
    scored = fed()
    scored.compute()
    scored.update(images(9, seed=5), real=True)
    expected = fed()
    expected.update(images(9, seed=5), real=True)
    assert scored.compute() == expected.compute() != fed().compute()


def test_calling_it_adds_a_batch_and_forgets_none():
    scored = fed()
    assert scored(images(9, seed=5), real=False) is None
    expected = fed()
    expected.update(images(9, seed=5), real=False)
    assert scored.compute() == expected.compute()


def test_a_changed_result_changes_no_later_one():
    scored = fed()
    scored.compute().clear()
    assert scored.compute() == fed().compute()


class Holder(nn.Module):
    """A module with a metric, as a LightningModule would hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.score = fed()


def test_nothing_of_it_is_in_a_checkpoint_or_an_optimizer():
    holder = Holder()
    assert set(holder.state_dict()) == {"net.weight", "net.bias"}
    assert len(list(holder.parameters())) == 2
    holder.load_state_dict(nn.ModuleDict({"net": nn.Linear(2, 2)}).state_dict())


def test_the_extractor_stays_in_evaluation_mode():
    holder = Holder().train()
    assert not any(module.training for module in holder.score.extractor.modules())
    assert holder.score.compute() == fed().compute()


def test_the_extractor_moves_with_the_module():
    holder = Holder().to("meta")
    assert holder.score.device.type == "meta"
    assert holder.score.extractor.weight.device.type == "meta"


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_the_extractor_stays_in_float32(change):
    holder = Holder()
    change(holder)
    assert holder.net.weight.dtype != torch.float32
    assert holder.score.extractor.weight.dtype == torch.float32
    holder.score.update(images(3), real=False)


def test_autocast_and_global_precision_change_no_score():
    expected = fed().compute()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert fed().compute() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_copy_is_independent():
    scored = fed()
    copied = copy.deepcopy(scored)
    copied.update(images(9, seed=5), real=False)
    assert scored.compute() == fed().compute() != copied.compute()


def test_no_measure_and_missing_logits_are_refused():
    with pytest.raises(ValueError, match="needs at least one"):
        metric(())
    extractor = TinyFeatures()
    extractor.num_classes = None
    GenerativeMetrics(extractor, [Frechet(), Kernel()])
    with pytest.raises(ValueError, match="ModeCoverage: needs class logits, which TinyFeatures does not give"):
        GenerativeMetrics(extractor, [Frechet(), ModeCoverage()])
