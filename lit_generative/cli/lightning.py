"""``litgen fit|validate|test|predict``: LightningCLI, with readable errors and run folders one can resume in."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.progress_bar import RunProgressBar
from lit_generative.callbacks.sample_writer import SampleWriter
from lit_generative.cli.errors import HelpfulParser
from lit_generative.cli.run_folder import choose_run, last_checkpoint
from lit_generative.loading import check_trust
from lit_generative.tracebacks import causes, is_ours
from lit_generative.training.checkpoint_io import SafeCheckpointIO, load_checkpoint
from lit_generative.training.csv_logger import CSVLogger

WANDB_KEY = "wandb_run_id"


class LitGenCLI(LightningCLI):
    """Model and data by ``class_path``; when fitting, config and command line win over the checkpoint."""

    @override
    def _parse_ckpt_path(self) -> None:
        """Find ``last``, choose the run's folder; evaluation alone takes its model from the checkpoint."""
        command = self.config.subcommand
        config = self.config[command]
        if command != "fit" and not config.ckpt_path:
            raise ValueError(
                f"litgen {command} needs a checkpoint, or it would use random weights. Add --ckpt_path last, or "
                "--ckpt_path FILE."
            )
        resumed = None
        if config.ckpt_path == "last":
            resumed = last_checkpoint(config.trainer)
            if resumed is None and command != "fit":
                raise ValueError("--ckpt_path last: there is no last.ckpt of this config's runs. Train it first.")
            config.ckpt_path = None if resumed is None else str(resumed)
        checkpoint = load_checkpoint(config.ckpt_path) if config.ckpt_path else {}
        self._resumed_step = checkpoint.get("global_step")  # all that a run needs to keep of it
        choose_run(config.trainer, command, resumed)
        if command == "fit" and resumed is not None:
            _continue_wandb(config.trainer, checkpoint.get(WANDB_KEY))
        if command != "fit":
            hparams = checkpoint.get("hyper_parameters", {})
            if "_class_path" not in hparams:
                raise ValueError(f"{config.ckpt_path} does not say which class it holds. It is not of lit_generative.")
            # What the user's own config names is trusted already.
            check_trust(config.ckpt_path, hparams, {name.partition(".")[0] for name in _class_paths(config.model)})
            super()._parse_ckpt_path()

    @override
    def before_instantiate_classes(self) -> None:
        """Give data that needs a pretrained model, for its tokenizer say, the one that is fine-tuned."""
        config = self.config[self.config.subcommand]
        data, model = (config[name].get("init_args", {}) for name in ("data", "model"))
        if "pretrained" in data and data["pretrained"] is None and "pretrained" in model:
            data["pretrained"] = model["pretrained"]
            if data.get("revision") is None:
                data["revision"] = model.get("revision")

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            # jsonargparse wraps what a constructor raised in the whole config.
            cause = next((e for e in causes(error) if is_ours(e)), None)
            if cause is None:
                raise
            raise cause from None

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        callbacks, plugins = _as_list(config.get("callbacks")), _as_list(config.get("plugins"))
        if config.get("enable_checkpointing") is not False and not _has(callbacks, ModelCheckpoint):
            callbacks.append(Checkpoint())
        if self.subcommand == "predict" and not _has(callbacks, SampleWriter):
            callbacks.append(SampleWriter())
        if config.get("enable_progress_bar") is not False and not _has(callbacks, ProgressBar):
            callbacks.append(RunProgressBar())
        if not _has(plugins, CheckpointIO):
            plugins.append(SafeCheckpointIO())
        trainer = super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)
        if self.subcommand == "fit" and self._resumed_step is not None:
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    logger.continue_from(self._resumed_step)
        return trainer

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # they are on disk
        return kwargs


class SaveConfig(SaveConfigCallback):
    """Keeps the whole config beside the run, in each checkpoint as ``checkpoint["config"]`` (YAML text), and in W&B."""

    @cached_property
    def _text(self) -> str:
        return str(self.parser.dump(self.config, skip_none=False))

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self._text
        checkpoint[WANDB_KEY] = next((logger.version for logger in _wandb_loggers(trainer)), None)

    @override
    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for logger in _wandb_loggers(trainer):
            logger.log_hyperparams({"cli": yaml.safe_load(self._text)})  # beside the module's own, which are flat


def main(args: Sequence[str]) -> int:
    """Run one of Lightning's commands.

    Returns:
        The exit code.
    """
    _quieten()
    HelpfulParser.started_in, HelpfulParser.arguments = Path.cwd(), list(args)
    LitGenCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=HelpfulParser,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        seed_everything_default=0,
        args=None if list(args) == sys.argv[1:] else list(args),
    )
    return 0


def _quieten() -> None:
    """Drop what Lightning says to everyone and what does not hold here."""
    for message in (
        ".*isinstance.treespec, LeafSpec.*",  # its own deprecated call
        ".*smaller than the logging interval.*",  # our interval runs on over epochs
        ".*does not have many workers.*",  # data in memory needs none
        ".*Experiment logs directory .* exists.*",  # a resumed run goes on in its folder, and nothing is deleted
        ".*Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero.addFilter(lambda record: "Tip:" not in record.getMessage())


def _wandb_loggers(trainer: L.Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _continue_wandb(trainer: Any, run_id: str | None) -> None:
    """Let a resumed run go on as the run it was on W&B, unless the config names one.

    Args:
        trainer: The ``trainer`` part of a parsed config; changed in place.
        run_id: What the checkpoint says.
    """
    for logger in _as_list(trainer.get("logger")):
        arguments: Any = logger.get("init_args", {}) if hasattr(logger, "class_path") else {}
        if "id" in arguments and arguments.id is None and arguments.version is None:
            arguments.id = run_id


def _class_paths(config: Any) -> Iterator[str]:
    if isinstance(config, Namespace):
        if "class_path" in config:
            yield config.class_path
        for value in vars(config).values():
            yield from _class_paths(value)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _has(values: list[Any], cls: type) -> bool:
    return any(isinstance(value, cls) for value in values)
