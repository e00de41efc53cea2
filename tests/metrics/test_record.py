import json

import pytest

from lit_generative.metrics.frechet import Frechet
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.record import check_comparable, differences, score_record
from tests.metrics.tiny_features import TinyFeatures


def record(extractor=None, measures=(), count: int = 100, seed: int | None = 0, split: str = "train", **subject):
    measures = measures or [Frechet(), Kernel(max_samples=50)]
    reference = {"data": "Digits", "split": split, "count": 1455, "fingerprint": "ab"}
    return score_record(extractor or TinyFeatures(), measures, reference, {"count": count, "seed": seed, **subject})


def test_a_record_is_plain_data_and_apart_from_its_subject():
    made = json.loads(json.dumps(record(sampler="DDIM", step=3)))
    assert made["name"] == "Frechet distance (tiny features)"
    assert (made["extractor"], made["dim"], made["num_samples"], made["seed"]) == ("tiny", 8, 100, 0)
    assert made["measures"] == {"Frechet": {}, "Kernel": {"max_samples": 50}}
    assert made["reference"]["split"] == "train"
    assert made["subject"] == {"sampler": "DDIM", "step": 3}
    assert made["quantization"] == "uint8, rounded"
    assert "shown" not in made
    assert record(shown={"split": "val"}, step=3)["subject"] == {"step": 3}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"extractor": TinyFeatures(seed=1)}, "extractor_sha256"),
        ({"extractor": TinyFeatures(dim=9)}, "dim: 8 and 9"),
        ({"measures": [Kernel(max_samples=60)]}, "Kernel: {'max_samples': 50} and {'max_samples': 60}"),
        ({"count": 101}, "num_samples: 100 and 101"),
        ({"seed": 1}, "seed: 0 and 1"),
        ({"split": "test"}, "reference: "),
        ({"shown": {"split": "val"}}, "shown: None and {'split': 'val'}"),
    ],
)
def test_every_difference_of_protocol_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match="not comparable") as error:
        check_comparable(record(), record(**changes))
    assert named in str(error.value)


@pytest.mark.parametrize("changes", [{}, {"sampler": "DDPM"}, {"step": 9}, {"seed": None}, {"measures": [Frechet()]}])
def test_what_was_measured_may_differ(changes):
    assert differences(record(sampler="DDIM"), record(**changes)) == []
    check_comparable(record(**changes), record(sampler="DDIM"))


def test_all_differences_are_named_at_once():
    assert len(differences(record(), record(count=5, seed=2, split="val"))) == 3
