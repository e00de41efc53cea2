"""Objects that remember how they were built, so that a checkpoint can build them again.

``LightningCLI`` stores the class path and arguments of everything a config builds. An object made in Python has no
config; :class:`Recorded` keeps one for it, in the same form, and :func:`describe` collects it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
from collections.abc import Mapping
from typing import Any


class Recorded:
    """Mixin: keeps the arguments of the constructor in ``self._recipe`` as ``{"class_path", "init_args"}``."""

    _recipe: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        init = cls.__init__

        @functools.wraps(init)
        def recording_init(self: Recorded, *args: Any, **kwargs: Any) -> None:
            # The outermost constructor runs first; those of its base classes must not overwrite its record.
            if "_recipe" not in self.__dict__:
                bound = inspect.signature(init).bind(self, *args, **kwargs)
                bound.apply_defaults()
                arguments = dict(list(bound.arguments.items())[1:])
                self.__dict__["_recipe"] = {"class_path": class_path(type(self)), "init_args": arguments}
            init(self, *args, **kwargs)

        cls.__init__ = recording_init  # type: ignore[method-assign, assignment]


def constructor_arguments(cls: type) -> list[str]:
    """Names of the arguments that a class takes; ``**kwargs`` stand for those of its base class."""
    names: list[str] = []
    for base in inspect.getmro(cls):
        if "__init__" not in base.__dict__:
            continue
        parameters = list(inspect.signature(base.__dict__["__init__"]).parameters.values())[1:]
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(dict.fromkeys(names))


def _needs_no_arguments(value: Any) -> bool:
    """Whether calling its class gives an equal object: one written in Python, without constructor or attributes."""
    written = [vars(base) for base in type(value).__mro__[:-1]]
    return getattr(value, "__dict__", None) == {} and not any("__init__" in b or "__new__" in b for b in written)


def _class_of_partial(value: Any) -> type | None:
    """What a ``functools.partial`` builds: its class, or the one jsonargparse hands to a function of its own."""
    if not isinstance(value, functools.partial):
        return None
    if isinstance(value.func, type):
        return None if value.args else value.func
    by_parser = str(value.func.__module__).partition(".")[0] == "jsonargparse"
    return value.args[-1] if by_parser and value.args and isinstance(value.args[-1], type) else None


def _recipe_of(value: Any) -> dict[str, Any] | None:
    """Class path and constructor's arguments, of a :class:`Recorded` object or a module with hyperparameters."""
    hparams = getattr(value, "hparams", None)
    if not isinstance(hparams, Mapping) or "_class_path" not in hparams:
        return getattr(value, "_recipe", None)
    if not are_of(hparams, type(value)):
        return None
    arguments = {key: item for key, item in hparams.items() if not key.startswith("_")}
    return {"class_path": hparams["_class_path"], "init_args": arguments}


def are_of(hparams: Mapping[str, Any], cls: type) -> bool:
    """Whether hyperparameters are those of ``cls``, as far as they name a class.

    LightningCLI gives a module within a module the hyperparameters of the outer one.
    """
    return str(hparams.get("_class_path", cls.__name__)).rpartition(".")[2] == cls.__name__


def _settings_of(value: Any) -> dict[str, Any] | None:
    """Fields of a dataclass, as a config of PEFT is one, that differ from their defaults; None for other objects."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return None
    settings = {}
    for field in dataclasses.fields(value):
        made = field.default_factory() if callable(field.default_factory) else field.default
        if field.init and (found := getattr(value, field.name)) != made:
            settings[field.name] = sorted(found) if isinstance(found, set) else found
    return settings


def class_path(cls: type) -> str:
    """Where ``cls`` can be imported from: ``module.QualName``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def describe(value: Any) -> Any:
    """Turn a constructor argument into plain data that a config could hold.

    Args:
        value: A number, string, None, enum, list, tuple, dict, :class:`Recorded` object, dataclass, class,
            ``functools.partial`` of a class (an optimizer with its settings), or a module whose ``hparams`` name its
            ``_class_path``.

    Returns:
        Numbers, strings, None, lists and dicts only.

    Raises:
        TypeError: If ``value``, or something in it, cannot be written down.
    """
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, type):
        return {"class_path": class_path(value)}
    if (built := _class_of_partial(value)) is not None:
        return {"class_path": class_path(built), "init_args": describe(value.keywords)}
    recipe = _recipe_of(value)
    cls = type(value)
    if recipe is None and (settings := _settings_of(value)) is not None:
        return {"class_path": class_path(cls), "init_args": describe(settings)}
    if recipe is None and _needs_no_arguments(value):
        return {"class_path": class_path(cls)}
    if recipe is None:
        raise TypeError(
            f"{type(value).__name__} does not say how it was built, so a checkpoint could not build it again. "
            "Derive it from lit_generative.recipe.Recorded; give an optimizer as a class or functools.partial of one."
        )
    return {"class_path": recipe["class_path"], "init_args": describe(recipe["init_args"])}
