import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule
from lit_generative.diffusion.times import LogitNormal, LogNormalSigma, LossSecondMoment, TimeSampling, UniformTimes
from tests import tiny

SAMPLINGS = [cls for cls in TimeSampling.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_sampling = pytest.mark.parametrize("sampling_class", SAMPLINGS)


class Straight(NoiseSchedule):
    """Continuous: ``alpha = 1 - t``, ``sigma = t``."""

    clean = 0.0

    def alpha_sigma(self, t):
        return 1 - t, t

    def level(self, t):
        raise NotImplementedError

    def random_times(self, num, device):
        return torch.rand(num, device=device)

    def spread(self, u):
        return u

    def even_times(self, num):
        raise NotImplementedError

    def nearest_times(self, ratios):
        return ratios / (1 + ratios)


def seeded(seed: int = 0) -> None:
    torch.manual_seed(seed)


def of(sampling_class: type[TimeSampling], num_timesteps: int) -> TimeSampling:
    """A sampling with its defaults."""
    options = {"num_timesteps": num_timesteps} if sampling_class is LossSecondMoment else {}
    return sampling_class(**options)


def learned(losses: list[list[float]], **options) -> LossSecondMoment:
    """A history of the rows of ``losses``, one for each time, seen in columns."""
    sampling = LossSecondMoment(**{"history": len(losses[0]), "num_timesteps": len(losses)} | options)
    for column in torch.tensor(losses).T:
        sampling.observe(torch.arange(len(losses)), column)
    return sampling


# ---- all of them


@pytest.mark.parametrize(
    ("sampling_class", "schedule"),
    [
        *[(cls, CosineSchedule(7)) for cls in SAMPLINGS],
        *[(cls, Straight()) for cls in SAMPLINGS if cls is not LossSecondMoment],
    ],
)
def test_times_are_of_the_schedule_and_of_the_type_networks_get(sampling_class, schedule):
    seeded()
    t, factor = of(sampling_class, 7).draw(500, schedule, "cpu")
    assert t.shape == (500,)
    assert t.dtype == (torch.float32 if isinstance(schedule, Straight) else torch.int64)
    assert t.min() >= 0
    assert t.max() < (1 if isinstance(schedule, Straight) else 7)
    assert len(t.unique()) >= 5
    assert factor is None or factor.shape == (500,)


@every_sampling
def test_equal_seeds_draw_equal_times(sampling_class):
    draws = []
    for seed in (3, 3, 4):
        seeded(seed)
        draws.append(of(sampling_class, 40).draw(50, CosineSchedule(40), "cpu")[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_uniform_times_need_no_factor_and_have_no_state():
    assert UniformTimes().draw(3, CosineSchedule(5), "cpu")[1] is None
    UniformTimes().observe(torch.tensor([1]), torch.tensor([2.0]))
    assert UniformTimes().state_dict() == {}


# ---- importance sampling


def test_times_are_drawn_in_proportion_to_the_root_of_the_mean_square():
    sampling = learned([[1.0, 7.0], [3.0, 4.0], [0.0, 1.0]], uniform_share=0.25)
    roots = torch.tensor([math.sqrt(25.0), math.sqrt(12.5), math.sqrt(0.5)])
    expected = 0.25 / 3 + 0.75 * roots / roots.sum()
    torch.testing.assert_close(sampling.probabilities(), expected)
    seeded()
    t, factor = sampling.draw(40_000, LinearSchedule(3, beta_end=0.1), "cpu")
    torch.testing.assert_close(torch.bincount(t) / 40_000, expected, rtol=0, atol=0.01)
    torch.testing.assert_close(factor, 1 / (3 * expected[t]))


def test_the_expected_loss_is_that_of_uniform_times():
    sampling = learned([[0.1, 0.3], [4.0, 2.0], [1.0, 1.0], [0.0, 0.0]], uniform_share=0.1)
    loss = torch.tensor([0.7, 3.0, 1.5, 0.2])
    seeded()
    t, factor = sampling.draw(100_000, LinearSchedule(4, beta_end=0.1), "cpu")
    assert t.float().mean() < 1.3
    torch.testing.assert_close((factor * loss[t]).mean(), loss.mean(), rtol=0.02, atol=0)
    probabilities = sampling.probabilities()
    torch.testing.assert_close((probabilities / (4 * probabilities) * loss).sum(), loss.mean())


def test_the_variance_falls_when_losses_differ():
    rows = [[10.0**k, 10.0**k] for k in range(-3, 2)]
    sampling, loss = learned(rows), torch.tensor(rows)[:, 0]
    seeded()
    t, factor = sampling.draw(20_000, LinearSchedule(5, beta_end=0.1), "cpu")
    uniform = torch.randint(5, (20_000,))
    assert (factor * loss[t]).std() < 0.1 * loss[uniform].std()


def test_times_are_uniform_until_each_has_a_full_history():
    sampling, schedule = LossSecondMoment(history=2, num_timesteps=3), LinearSchedule(3, beta_end=0.1)
    for t in ([0, 1, 2], [0, 1], [0, 0, 1]):
        sampling.observe(torch.tensor(t), torch.tensor([9.0, 1.0, 4.0])[: len(t)])
        assert sampling.probabilities().tolist() == pytest.approx([1 / 3] * 3)
        torch.testing.assert_close(sampling.draw(4, schedule, "cpu")[1], torch.ones(4))
    sampling.observe(torch.tensor([2]), torch.tensor([1.0]))
    assert sampling.probabilities()[0] > 0.4


def test_the_history_holds_the_last_losses_of_each_time():
    sampling = LossSecondMoment(history=3, num_timesteps=4)
    sampling.observe(torch.tensor([2, 0, 2]), torch.tensor([1.0, 2.0, 3.0]))
    sampling.observe(torch.tensor([2, 2]), torch.tensor([4.0, 5.0]))
    sampling.observe(torch.tensor([1, 1, 1, 1, 1, 3]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert sampling.counts.tolist() == [1, 5, 4, 1]
    assert [sorted(row) for row in sampling.losses.tolist()] == [
        [0, 0, 2],
        [3, 4, 5],
        [3, 4, 5],
        [0, 0, 6],
    ]


def test_losses_that_are_not_finite_are_left_out():
    sampling = learned([[1.0, 2.0], [3.0, 4.0]])
    before = {name: value.clone() for name, value in sampling.state_dict().items()}
    sampling.observe(torch.tensor([0, 1, 0]), torch.tensor([float("nan"), float("inf"), -float("inf")]))
    torch.testing.assert_close(dict(sampling.state_dict()), before, rtol=0, atol=0)


def test_losses_of_zero_are_drawn_alike():
    sampling = learned([[0.0], [0.0], [0.0], [0.0]])
    assert sampling.probabilities().tolist() == [0.25] * 4


def test_a_time_without_loss_keeps_its_share_of_uniform_draws():
    sampling = learned([[0.0], [1.0]], uniform_share=0.2)
    assert sampling.probabilities().tolist() == pytest.approx([0.1, 0.9])


def test_the_history_keeps_no_graph_and_takes_half_precision():
    sampling = LossSecondMoment(history=1, num_timesteps=2)
    sampling.observe(torch.tensor([0]), torch.tensor([2.0], dtype=torch.bfloat16, requires_grad=True))
    assert sampling.losses.tolist() == [[2.0], [0.0]]
    assert not sampling.losses.requires_grad


def test_a_checkpoint_brings_the_history_back():
    sampling = learned([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    other = LossSecondMoment(history=2, num_timesteps=3)
    assert set(sampling.state_dict()) == {"losses", "counts"}
    other.load_state_dict(sampling.state_dict())
    tiny.assert_same(dict(other.state_dict()), dict(sampling.state_dict()))
    torch.testing.assert_close(other.probabilities(), sampling.probabilities())
    other.observe(torch.tensor([1]), torch.tensor([9.0]))
    assert sorted(other.losses[1].tolist()) == [4.0, 9.0]


def _observe_its_own(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    sampling = LossSecondMoment(history=3, num_timesteps=3)
    if rank == 0:
        sampling.observe(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    else:
        sampling.observe(torch.tensor([1, 2, 2]), torch.tensor([3.0, 4.0, 5.0]))
    torch.save(sampling.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_hold_the_losses_of_all_also_of_unequal_batches(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_observe_its_own, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    tiny.assert_same(dict(first), dict(second))
    assert first["losses"].tolist() == [[1, 0, 0], [2, 3, 0], [4, 5, 0]]
    assert first["counts"].tolist() == [1, 2, 2]


def test_a_run_with_importance_sampling_survives_a_reload(tmp_path):
    module = tiny.point_ddpm(times=LossSecondMoment(history=1, num_timesteps=10))
    tiny.train(tmp_path, module, tiny.ring()).save_checkpoint(tmp_path / "run.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert module.times.counts.sum() == 18
    assert loaded.times.history == 1
    tiny.assert_same(tiny.weights(loaded), tiny.weights(module))


# ---- the two distributions


@pytest.mark.parametrize("options", [{}, {"mean": 0.4, "std": 0.5}])
def test_the_logarithm_of_the_noise_is_normal(options):
    seeded()
    t, factor = LogNormalSigma(**options).draw(4_000, Straight(), "cpu")
    alpha, sigma = Straight().alpha_sigma(t.double())
    log_ratio = (sigma / alpha).log()
    assert factor is None
    assert log_ratio.mean().item() == pytest.approx(options.get("mean", -1.2), abs=0.06)
    assert log_ratio.std().item() == pytest.approx(options.get("std", 1.2), abs=0.04)
    assert log_ratio.sub(log_ratio.mean()).pow(3).mean().item() == pytest.approx(0, abs=0.2)


def test_of_a_discrete_schedule_the_nearest_steps_are_taken():
    seeded()
    schedule = CosineSchedule(1000)
    t, _ = LogNormalSigma(mean=0.0, std=0.3).draw(2_000, schedule, "cpu")
    alpha, sigma = schedule.alpha_sigma(t)
    log_ratio = (sigma / alpha).log()
    assert log_ratio.mean().item() == pytest.approx(0, abs=0.03)
    assert log_ratio.std().item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("options", [{}, {"mean": 0.7, "std": 0.5}])
def test_the_logit_of_the_time_is_normal(options):
    seeded()
    t, factor = LogitNormal(**options).draw(10_000, Straight(), "cpu")
    assert factor is None
    assert t.logit().mean().item() == pytest.approx(options.get("mean", 0.0), abs=0.03)
    assert t.logit().std().item() == pytest.approx(options.get("std", 1.0), abs=0.03)


def test_no_time_is_rounded_out_of_the_unit_interval():
    t, _ = LogitNormal(mean=40.0).draw(10, Straight(), "cpu")
    assert (t < 1).all()


# ---- refusals


def test_a_continuous_schedule_has_no_history():
    with pytest.raises(ValueError, match="LossSecondMoment: keeps losses of numbered steps, and Straight has none"):
        LossSecondMoment().draw(2, Straight(), "cpu")
    with pytest.raises(ValueError, match="LossSecondMoment: keeps losses of numbered steps, and Straight has none"):
        LossSecondMoment().check(Straight())


@pytest.mark.parametrize("sampling_class", [cls for cls in SAMPLINGS if cls is not LossSecondMoment])
def test_all_others_take_any_schedule(sampling_class):
    for schedule in (Straight(), LinearSchedule(3, beta_end=0.1)):
        sampling_class().check(schedule)


def test_a_history_of_another_schedule_is_refused():
    sampling = learned([[1.0], [2.0]])
    with pytest.raises(ValueError, match="keeps losses of 2 noise levels, but the schedule has 3"):
        sampling.draw(2, LinearSchedule(3, beta_end=0.1), "cpu")


@pytest.mark.parametrize("options", [{"history": 0}, {"num_timesteps": 0}])
def test_a_history_of_nothing_is_refused(options):
    with pytest.raises(ValueError, match="LossSecondMoment: history and num_timesteps must be at least 1, got"):
        LossSecondMoment(**options)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"LossSecondMoment: uniform_share must lie in \[0, 1\], got"):
        LossSecondMoment(uniform_share=share)


@pytest.mark.parametrize("options", [{"std": 0.0}, {"std": math.inf}, {"std": math.nan}, {"mean": math.nan}])
@pytest.mark.parametrize("sampling_class", [LogNormalSigma, LogitNormal])
def test_a_distribution_without_middle_or_width_is_refused(sampling_class, options):
    with pytest.raises(ValueError, match=rf"{sampling_class.__name__}: mean must be finite, and std positive and fini"):
        sampling_class(**options)
