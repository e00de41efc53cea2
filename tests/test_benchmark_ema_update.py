"""The EMA benchmark runs, and its contenders do the work they are named for."""

from __future__ import annotations

import torch

from benchmarks import ema_update


def test_it_prints_a_row_for_each_contender(capsys):
    ema_update.main(["--quick", "--rounds", "2", "--repeats", "1"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "**" in line]
    assert [row[0].strip() for row in rows] == ["EMA callback", "one pass", "in place", "loop", "flat"]
    assert all(float(row[1]) >= 0 for row in rows)


def test_the_callback_and_the_loop_compute_the_same_average():
    torch.manual_seed(0)
    module = ema_update.Holder(quick=True)
    update, ema = ema_update.ours(module)
    live = list(module.network.parameters())
    expected = [p.detach().clone() for p in live]
    with torch.no_grad():
        for p in live:
            p.add_(1)
        update()
        for average, p in zip(expected, live, strict=True):
            average.mul_(ema_update.DECAY).add_(p, alpha=1 - ema_update.DECAY)
    torch.testing.assert_close(list(ema.state_dict()["weights"]["ema"].values()), expected)
