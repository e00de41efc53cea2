"""Errors of configs and command lines in one line: the key, what is wrong with it, and the nearest right one.

jsonargparse names the last part of a wrong key only, after a hundred lines of usage. So the config is walked once more
here, after the parser has refused it, to find the whole key.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lit_generative.recipe import constructor_arguments

STRUCTURE = ("class_path", "init_args", "dict_kwargs")
TOP_LEVEL = ("seed_everything", "trainer", "model", "data", "ckpt_path", "weights_only", "verbose", "config")


class HelpfulParser(LightningArgumentParser):
    """LightningCLI's parser, with errors that a newcomer can act on."""

    # jsonargparse changes into a config's folder while it reads it, and makes further parsers there.
    started_in = Path.cwd()
    arguments: ClassVar[list[str]] = []
    """The command line, without the program's name; set before parsing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)  # a mistyped option must not pass for another

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one readable error and exit with 2."""
        try:
            os.chdir(self.started_in)
            text = explain(message, self.arguments)
        except Exception as unexpected:  # an explanation must never hide the error itself
            text = f"{_one_line(message)} (no further explanation: {unexpected})"
        print(f"litgen: error: {text}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from ex


def explain(message: str, arguments: Iterable[str]) -> str:
    """Say which key of the files and options is wrong, and how.

    Args:
        message: What the parser said.
        arguments: The command line without the program's name.

    Returns:
        One line.
    """
    if "File does not exist" in message:
        return _one_line(message).removeprefix('Parser key "config": ') + _nearby_file(message)
    if "Problems parsing config" in message:
        return _broken_file(list(arguments)) or _one_line(message)
    config, options = merged_config(list(arguments))
    found = next(wrong_keys(config), None)
    if found is not None:
        return found
    if match := re.search(r'Parser key "([^"]+)":\s+(Expected .*)', message, re.DOTALL):
        key = _full_key(config, match[1].rpartition(".")[2])
        return f"{key}: {_one_line(match[2])}"
    if "arguments are required" in message:
        return (
            f"{_one_line(message)}. Give a config, as in: litgen fit --config configs/gan/dcgan_digits.yaml"
            if "--config" not in options and "-c" not in options
            else _one_line(message).replace("fit.", "")
        )
    return _one_line(message)


def merged_config(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Files and options laid over each other in their order, and the names of all options.

    Args:
        arguments: The command line without the program's name.
    """
    config: dict[str, Any] = {}
    options: list[str] = []
    rest = iter(arguments[1:])
    for argument in rest:
        if not argument.startswith("-"):
            continue
        name, _, value = argument.partition("=")
        if "=" not in argument:
            value = next(rest, "")
        options.append(name)
        if name in ("-c", "--config"):
            _overlay(config, yaml.safe_load(Path(value).read_text()) or {})
        else:
            _set(config, name.lstrip("-").split("."), yaml.safe_load(value))
    return config, options


def wrong_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Each key that nothing takes, and each class that cannot be found, in the order of the config."""
    trainer = _arguments_of(L.Trainer)
    for key in config:
        if key not in TOP_LEVEL:
            yield _unknown(key, "litgen has no such option", TOP_LEVEL)
    for key in config.get("trainer") or {}:
        if key not in trainer:
            yield _unknown(f"trainer.{key}", "Trainer has no such argument", trainer)
    for key, value in config.items():
        yield from _wrong_below(key, value)


def _wrong_below(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _wrong_below(f"{path}[{index}]", item)
    if not isinstance(value, Mapping):
        return
    taken: list[str] | None = None
    if isinstance(value.get("class_path"), str):
        cls, problem = find_class(value["class_path"])
        if problem:
            yield f"{path}: {problem}"
            return
        taken = _arguments_of(cls)
        for key in [k for k in value if k not in STRUCTURE]:
            yield _unknown(f"{path}.{key}", "beside class_path there may be init_args", STRUCTURE)
    children = value.get("init_args") if taken is not None else value
    for key, child in (children or {}).items():
        if taken is not None and key not in taken:
            yield _unknown(f"{path}.{key}", f"{value['class_path'].rpartition('.')[2]} has no such argument", taken)
        yield from _wrong_below(f"{path}.{key}", child)


def find_class(path: str) -> tuple[Any, str | None]:
    """The class a config names, or what is wrong with the name.

    Args:
        path: ``module.Class``.
    """
    package, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(package) if package else None
    except ImportError as error:
        return None, f"{path} cannot be imported: {error}.{_did_you_mean(path, _known_classes())}"
    cls = getattr(module, name, None)
    if cls is not None:
        return cls, None
    local = [key for key, value in vars(module).items() if isinstance(value, type)] if module else []
    hint = _did_you_mean(name, local) or _did_you_mean(path, _known_classes())
    return None, f"there is no class {name!r} in {package or 'a module'}.{hint}"


def _known_classes() -> list[str]:
    """Classes of the modules of ours that are imported by now, and of those a config usually names."""
    for name in ("gan.losses", "networks.dcgan", "networks.conv_vae", "networks.diffusers_unet", "networks.mlp"):
        importlib.import_module(f"lit_generative.{name}")
    return [
        f"{module}.{key}"
        for module, content in list(sys.modules.items())
        if module.startswith("lit_generative.")
        for key, value in vars(content).items()
        if isinstance(value, type) and value.__module__ == module
    ]


def _arguments_of(cls: Any) -> list[str]:
    """Names of what a config may give: not what the module or the optimizer passes by itself."""
    if not isinstance(cls, type):
        return list(inspect.signature(cls).parameters)
    passed = ("params",) if issubclass(cls, Optimizer) else ("optimizer",) if issubclass(cls, LRScheduler) else ()
    return [name for name in constructor_arguments(cls) if name not in passed]


def _unknown(key: str, problem: str, known: Iterable[str]) -> str:
    known = list(known)
    hint = _did_you_mean(key.rpartition(".")[2], known)
    return f"{key}: {problem}.{hint}" + ("" if hint else f" There are: {', '.join(known)}.")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def _nearby_file(message: str) -> str:
    match = re.search(r"File does not exist: '([^']+)'", message)
    if match is None:
        return ""
    wanted = Path(match[1])
    files = [str(p) for p in Path("configs").rglob("*.yaml")] or [str(p) for p in wanted.parent.glob("*.yaml")]
    by_name = {Path(f).name: f for f in files}
    close = difflib.get_close_matches(wanted.name, list(by_name), n=1, cutoff=0.5)
    return f". Did you mean {by_name[close[0]]}?" if close else ""


def _broken_file(arguments: list[str]) -> str | None:
    for name in arguments:
        if name.endswith((".yaml", ".yml", ".json")) and Path(name).is_file():
            try:
                yaml.safe_load(Path(name).read_text())
            except yaml.YAMLError as error:
                return f"{name} is not valid YAML: {_one_line(str(error)).replace('<unicode string>', name)}"
    return None


def _full_key(config: Mapping[str, Any], name: str) -> str:
    """The dotted key that ends in ``name``, if there is just one."""
    found = [path for path in _paths("", config) if path.rpartition(".")[2] == name]
    return found[0] if len(found) == 1 else name


def _paths(prefix: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        inner = value.get("init_args") or {} if "class_path" in value else value
        for key, child in inner.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path
            yield from _paths(path, child)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _paths(f"{prefix}[{index}]", child)


def _overlay(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _overlay(base[key], value)
        else:
            base[key] = value


def _set(config: dict[str, Any], keys: list[str], value: Any) -> None:
    """Put a command-line value where it belongs; ``model.loss`` means ``model.init_args.loss``."""
    node = config
    for index, key in enumerate(keys):
        if "class_path" in node and key not in STRUCTURE:
            node = node.setdefault("init_args", {})
        if index < len(keys) - 1:
            if not isinstance(node.get(key), dict):
                node[key] = {"class_path": node[key]} if isinstance(node.get(key), str) else {}
            node = node[key]
        elif isinstance(value, str) and isinstance(node.get(key), dict):
            node[key] = {"class_path": value}
        else:
            node[key] = value


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
