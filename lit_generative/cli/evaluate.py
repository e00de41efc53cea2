"""``litgen evaluate``: score images, or a checkpoint's samples, against reference images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_generative.cli import samplers
from lit_generative.cli.sample import add_weights_arguments, chosen_weights, positive

if TYPE_CHECKING:
    from lit_generative.metrics.feature_set import FeatureSet
    from lit_generative.metrics.features import FeatureExtractor
    from lit_generative.metrics.measures import Measure
    from lit_generative.metrics.sources import ImageSource

METRICS = ("fid", "fid_inf", "kid", "is", "prdc", "modes")
DEFAULT_METRICS = ("fid", "kid", "is", "prdc")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; must stay free of torch, so that ``--help`` is quick."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", metavar="PATH", help="folder of images, or .npz with `images` (N, H, W, C)")
    what.add_argument("--ckpt_path", help="a checkpoint, or the folder of a run: its samples are scored")
    add(
        "--reference",
        metavar="PATH",
        help="what to compare with: folder, .npz, config whose `data` is used, or statistics written by "
        "--save_statistics",
    )
    add("--split", choices=("train", "val", "test"), default="train", help="part of a config's data (default: train)")
    add(
        "--extractor",
        default="inception",
        help="inception, digits, fashion, dinov2, clip, or the path of a class (default: inception)",
    )
    add("--weights", metavar="FILE", help="weights of the extractor")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="what the extractor computes in")
    add("--metrics", type=_metrics, help=f"some of {','.join(METRICS)} (default: {','.join(DEFAULT_METRICS)})")
    add("--json", metavar="OUT", help="write scores and record there")
    add("--save_statistics", metavar="OUT", help="write the features of --images, to be a --reference later")
    add("--compare", metavar="JSON", help="scores measured earlier; refused if they were measured otherwise")
    add("--num", type=_at_least_two, default=10_000, help="samples of a checkpoint (default: 10000)")
    add("--seed", type=int, default=0, help="seed of a checkpoint's samples (default: 0)")
    add("--batch_size", type=positive, default=64, help="images at a time (default: 64)")
    add("--device", default="auto", help="cpu, cuda, mps, or auto (default: auto)")
    add_weights_arguments(parser)
    samplers.add_arguments(parser)
    add("--trust", nargs="+", default=[], metavar="PACKAGE", help="further packages whose classes may be built")


def run(args: argparse.Namespace) -> list[Path | str]:
    """Extract, measure, print and write.

    Returns:
        The table, line by line, and the files written.

    Raises:
        ValueError: If an option does not fit, an image is damaged, or scores are not comparable.
        FileNotFoundError: If a file or the extractor's weights are not there.
    """
    import torch

    from lit_generative.loading import choose_device
    from lit_generative.metrics.extractors import build_extractor

    if args.reference is None and args.save_statistics is None:
        raise ValueError("--reference is missing: name the images to compare with, or --save_statistics OUT.")
    earlier = None if args.compare is None else _read_json(args.compare)
    device = choose_device(args.device)
    extractor = build_extractor(args.extractor, args.weights, args.dtype).to(device)
    measures = _measures(args.metrics, extractor)
    source, subject = _images(args, device)
    with torch.no_grad():
        return _evaluate(args, source, subject, extractor, measures, earlier, device)


def _evaluate(
    args: argparse.Namespace,
    source: ImageSource,
    subject: dict[str, Any],
    extractor: FeatureExtractor,
    measures: list[Measure],
    earlier: dict[str, Any] | None,
    device: Any,
) -> list[Path | str]:
    from lit_generative.cli.references import load_reference, save_statistics
    from lit_generative.metrics.evaluation import collect_features
    from lit_generative.metrics.frechet import Frechet, bias_warning
    from lit_generative.metrics.measures import compute_scores
    from lit_generative.metrics.record import score_record

    def collect(images: ImageSource, what: str) -> FeatureSet:
        with _progress(what, images.count) as progress:
            return collect_features(images, extractor, measures, args.batch_size, device, progress)

    out: list[Path | str] = []
    images_record = source.record() | subject
    reference = None
    if args.reference is not None:  # a wrong one is found before the work
        reference = load_reference(args.reference, args.split, extractor, measures, collect)
    fake = collect(source, "images")
    if args.save_statistics is not None:
        out.append(save_statistics(Path(args.save_statistics), fake, extractor, images_record))
    if reference is None:
        return out
    real, reference_record = reference
    if any(isinstance(measure, Frechet) for measure in measures) and (text := bias_warning(real.moments, source.count)):
        out.append(f"note: {text}")
    scores = compute_scores(measures, real, fake)
    result = {"metrics": scores, "record": score_record(extractor, measures, reference_record, images_record)}
    out += _table(result, earlier)
    if args.json is not None:
        out.append(_write_json(Path(args.json), result))
    return out


def _images(args: argparse.Namespace, device: Any) -> tuple[ImageSource, dict[str, Any]]:
    """The images to score, and what else the record says of them."""
    if args.images is not None:
        from lit_generative.cli.references import image_set

        return image_set(args.images), {}
    from lit_generative.loading import checkpoint_record, find_checkpoint, load_module
    from lit_generative.metrics.sources import ModelSamples

    ema = chosen_weights(args)
    path = find_checkpoint(args.ckpt_path)
    module = load_module(path, ema=ema, device=str(device), trust=args.trust)
    samplers.choose(args, module)
    subject = {"checkpoint": path.name, **checkpoint_record(path, ema)}
    return ModelSamples(module, args.num, args.seed), subject


def _measures(names: list[str] | None, extractor: FeatureExtractor) -> list[Measure]:
    from lit_generative.metrics.frechet import Frechet, FrechetInfinity
    from lit_generative.metrics.inception_score import InceptionScore
    from lit_generative.metrics.kernel import Kernel
    from lit_generative.metrics.mode_coverage import ModeCoverage
    from lit_generative.metrics.precision_recall import PrecisionRecall

    builders: dict[str, Callable[[], Measure]] = {
        "fid": Frechet,
        "fid_inf": FrechetInfinity,
        "kid": Kernel,
        "is": InceptionScore,
        "prdc": PrecisionRecall,
        "modes": ModeCoverage,
    }
    measures = [builders[name]() for name in names or DEFAULT_METRICS]
    if extractor.num_classes is not None:
        return measures
    if names is not None and (needy := [m for m in measures if m.needs_logits]):
        raise ValueError(
            f"--metrics: {type(needy[0]).__name__} needs a classifier, and {extractor.name} is none. Leave it out."
        )
    return [measure for measure in measures if not measure.needs_logits]


def _table(result: dict[str, Any], earlier: dict[str, Any] | None) -> list[Path | str]:
    """One line a score; beside it the earlier one, if there is any."""
    from lit_generative.metrics.record import check_comparable

    record = result["record"]
    labels = {"fid": record["name"], "fid_inf": f"{record['name']}, extrapolated", **LABELS}
    before = {}
    if earlier is not None:
        check_comparable(earlier["record"], record)
        before = earlier["metrics"]
    names = {name: labels.get(name, name) for name in result["metrics"]}
    width = max(map(len, names.values()))
    lines = [
        f"{label:<{width}}  {result['metrics'][name]:>12.6g}"
        + (f"  before {before[name]:.6g}" if name in before else "")
        for name, label in names.items()
    ]
    counts = f"{record['num_samples']} images against {record['reference'].get('count', 'unknown')}"
    return [*lines, f"{counts}; {record['extractor']} {record['extractor_sha256'][:12]}, {record['quantization']}"]


LABELS = {
    "kid": "kernel distance",
    "kid_se": "  its standard error",
    "is": "Inception score",
    "is_std": "  its deviation over parts",
    "modes": "classes drawn",
    "mode_kl": "KL of class shares (nats)",
}


def _progress(what: str, count: int) -> Any:
    import contextlib

    from tqdm import tqdm

    @contextlib.contextmanager
    def bar() -> Any:
        with tqdm(desc=what, total=count, unit=" images", leave=False, mininterval=0.5, disable=None) as shown:
            yield lambda done: shown.update(done) and None

    return bar()


def _read_json(path: str) -> dict[str, Any]:
    try:
        earlier = json.loads(Path(path).read_text())
        earlier["metrics"], earlier["record"]
    except FileNotFoundError:
        raise FileNotFoundError(f"--compare: there is no file {path}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--compare: {path} is not what litgen evaluate --json writes ({error!r}).") from None
    return dict(earlier)


def _write_json(path: Path, result: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _metrics(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    if not names:
        raise argparse.ArgumentTypeError(f"names no metric; there are {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def _at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"a score needs at least 2 samples, got {value}")
    return value
