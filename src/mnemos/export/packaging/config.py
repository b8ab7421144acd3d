"""Configs of modules: what packages keep of them, and the module that a class makes of one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from mnemos.errors import ConfigError


def plain_config(config: Any) -> dict[str, Any]:
    """A config as a dict: a mapping, a dataclass, an object with to_dict(), or None for an empty one."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    if callable(getattr(config, "to_dict", None)):
        return dict(config.to_dict())
    raise ConfigError(f"config is a {type(config).__name__}; expected a dict, a dataclass, or None")


def make_module(model_class: Any, config: dict[str, Any]) -> Any:
    """The module that a class, a function or a module itself makes of a config.

    The config's entries are the class's arguments; or the config is its only one, as an object of the class with which
    that is annotated, if it is. A module is taken as it is. ConfigError: the class cannot be called with the config.
    """
    if hasattr(model_class, "load_state_dict") and not isinstance(model_class, type):
        return model_class
    if not callable(model_class):
        raise ConfigError(f"model_class is a {type(model_class).__name__}; expected the class that was packed")
    made = _called(model_class, config)
    if not hasattr(made, "load_state_dict"):
        raise ConfigError(f"model_class made a {type(made).__name__}; expected a torch.nn.Module")
    return made


def _called(model_class: Any, config: dict[str, Any]) -> Any:
    signature = inspect.signature(model_class)
    try:
        signature.bind(**config)
    except TypeError as error:
        reason = error
    else:
        return model_class(**config)
    needed = [p for p in signature.parameters.values() if p.default is p.empty and p.kind not in _VARIADIC]
    if len(needed) == 1 and needed[0].kind is not needed[0].KEYWORD_ONLY and needed[0].name not in config:
        kind = _annotation(model_class, needed[0])
        if not isinstance(kind, type) or kind.__module__ in ("builtins", "typing", "collections.abc"):
            return model_class(Settings(config))
        try:
            inspect.signature(kind).bind(**config)
        except TypeError as error:
            reason = TypeError(f"{kind.__name__}: {error}")
        else:
            return model_class(kind(**config))
    name = getattr(model_class, "__name__", "model_class")
    raise ConfigError(
        f"config is {sorted(config)} and {name}{signature} cannot be called with it: {reason}; expected a config that "
        f"is its arguments, or model_class=lambda **config: {name}(...)"
    )


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Settings(dict[str, Any]):
    """A config whose entries are attributes too, for classes that ask for it either way."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}; it has {', '.join(self)}") from None


def _annotation(model_class: Any, parameter: inspect.Parameter) -> Any:
    """A parameter's annotation; one that is text as the class's own module understands it."""
    kind = None if parameter.annotation is parameter.empty else parameter.annotation
    if isinstance(kind, str):
        made_by = vars(model_class).get("__init__", model_class) if isinstance(model_class, type) else model_class
        kind = getattr(made_by, "__globals__", {}).get(kind, kind)
    return kind
