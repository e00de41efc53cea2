"""``litgen convert``: another library's file becomes a checkpoint."""

import torch

from lit_generative.__main__ import main
from lit_generative.loading import load_module
from tests.finetune import reference_stylegan2 as reference
from tests.finetune.persistent_pickles import Persistent, persistent_pickle

G = reference.random_generator([4, 2])
D = reference.random_discriminator([2, 4])


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def test_a_file_of_either_library_becomes_a_checkpoint_that_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"g_ema": G, "d": D, "latent_avg": torch.zeros(6)}, "r.pt")
    modules = {"D": Persistent("D", *reference.nvlabs_discriminator(D), **{"b4.mbstd.group_size": 4})}
    modules |= {name: Persistent("G", *reference.nvlabs_generator(G, torch.zeros(6))) for name in ("G", "G_ema")}
    (tmp_path / "n.pkl").write_bytes(persistent_pickle(modules))
    for layout, source in (("stylegan2-rosinality", "r.pt"), ("stylegan2-nvlabs", "n.pkl")):
        assert convert("--format", layout, "--input", source, "--out", f"{layout}.ckpt") == 0
        assert f"wrote {layout}.ckpt\n" in capsys.readouterr().out
    first, second = (load_module(f"stylegan2-{name}.ckpt") for name in ("rosinality", "nvlabs"))
    z = torch.randn(2, 6)
    torch.testing.assert_close(first.generator(z), second.generator(z))
    options = ["--num", "2", "--format", "npz", "--device", "cpu"]
    assert main(["sample", "--ckpt_path", "stylegan2-nvlabs.ckpt", *options]) == 0


def test_a_file_that_exists_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "out").write_text("years of work")
    arguments = ("--format", "stylegan2-nvlabs", "--input", tmp_path / "x", "--out", tmp_path / "out")
    assert convert(*arguments) == 1
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "years of work"


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    arguments = ("--format", "stylegan2-nvlabs", "--input", tmp_path / "x", "--out", tmp_path / "out")
    assert convert(*arguments) == 1
    assert "There is no file" in capsys.readouterr().err
