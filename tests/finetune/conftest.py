import pytest

from tests.finetune import tiny_llama as llama
from tests.finetune import tiny_stable_diffusion


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """A folder of Stable Diffusion that predicts the noise."""
    return saved_sd(tmp_path_factory, "sd")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory):
    """The same that predicts the velocity."""
    return saved_sd(tmp_path_factory, "sd-v")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """A folder of SDXL."""
    return saved_sd(tmp_path_factory, "sdxl")


def saved_sd(tmp_path_factory, kind):
    folder = tmp_path_factory.mktemp("tiny") / kind
    tiny_stable_diffusion.make(folder, kind)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder of LLaMA with random weights."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    llama.write(folder)
    return str(folder)


@pytest.fixture(scope="session")
def taught_llama(tmp_path_factory):
    """One that knows its toy texts a little."""
    folder = tmp_path_factory.mktemp("tiny") / "taught-llama"
    llama.write(folder, steps=150)
    return str(folder)
