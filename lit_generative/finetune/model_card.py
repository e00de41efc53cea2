"""A card beside exported weights: what they were trained on, how, and under which licence they may be used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CARD = "README.md"
UNKNOWN = "unknown"


class Origin(NamedTuple):
    """Where weights come from."""

    model: str
    """Class of the model."""
    base: str | None
    """Folder or hub name of the pretrained model, if any."""
    base_license: str | None
    """Its licence, as far as its own card says."""
    config: Mapping[str, Any]
    """The run's config; empty if the checkpoint holds none."""
    step: int
    """Updates made."""


def read_origin(checkpoint: Mapping[str, Any]) -> Origin:
    """What a checkpoint of ours says of its origin."""
    config = yaml.safe_load(checkpoint["config"]) if checkpoint.get("config") else {}
    hparams = checkpoint.get("hyper_parameters", {})
    base = hparams.get("pretrained")
    model = str(hparams.get("_class_path", UNKNOWN)).rpartition(".")[2]
    return Origin(model, base, license_of(base), config, int(checkpoint.get("global_step", 0)))


def license_of(base: str | None) -> str | None:
    """The licence in the card of a pretrained model's folder; None if there is none."""
    card = None if base is None else Path(base) / CARD
    if card is None or not card.is_file():
        return None
    _, head, _ = (*card.read_text().split("---", 2), "", "")[:3]
    fields = yaml.safe_load(head)
    return str(fields["license"]) if isinstance(fields, dict) and "license" in fields else None


def write_card(folder: Path, origin: Origin, how_to_load: str, license: str | None = None) -> Path:
    """Write ``README.md``, with the fields at its head that the Hugging Face hub reads.

    Args:
        folder: Holds the weights. A card that another library wrote there is replaced.
        origin: What the weights come from.
        how_to_load: A line of Python.
        license: Of the weights, as in ``openrail``; None takes the base's, and says ``unknown`` if that is not known.

    Returns:
        The file.
    """
    chosen = license or origin.base_license or UNKNOWN
    data, model, trainer = (origin.config.get(name) or {} for name in ("data", "model", "trainer"))
    fields = {"license": chosen, "base_model": origin.base, "tags": ["lit_generative", origin.model]}
    head = yaml.safe_dump({name: value for name, value in fields.items() if value is not None}, sort_keys=False)
    settings = {
        "steps": origin.step,
        "seed": origin.config.get("seed_everything"),
        "precision": trainer.get("precision"),
    }
    lines = [
        f"---\n{head}---\n",
        f"# {origin.model}, trained with lit_generative {version('lit-generative')}\n",
        f"Load it: `{how_to_load}`\n",
        "## Licence\n",
        f"{chosen}"
        + ("" if license else ", as far as the base's card says" if origin.base_license else ": not stated")
        + ". That of the training data counts too.\n",
        "## Data\n",
        _block(data) if data else "The checkpoint does not say.\n",
        "## Settings\n",
        _block({name: value for name, value in settings.items() if value is not None}),
        _block(model) if model else "",
    ]
    path = folder / CARD
    path.write_text("\n".join(line for line in lines if line))
    return path


def _block(value: Any) -> str:
    return f"```yaml\n{yaml.safe_dump(value, sort_keys=False)}```\n"
