"""The hierarchy of exceptions that Mnemos raises on purpose.

A message names the thing that is wrong, its value, and what would be right, in that order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MnemosError(Exception):
    """Root of every error that Mnemos raises on purpose."""


class FormatError(MnemosError):
    """A file (GGUF, safetensors, config, tokenizer, cache) is missing, truncated, corrupt or of an unknown kind."""


class UnsupportedError(MnemosError):
    """A valid request is not supported; the message lists what is."""


class ConfigError(MnemosError, ValueError):
    """A parameter has a value that is not allowed: the message gives the field, the value and the rule."""


class RequestError(MnemosError, ValueError):
    """A request cannot be run, for example because of an empty prompt or a token id out of range."""


class ContextLengthError(RequestError):
    """A prompt does not fit into the model's context; the message says by how much."""


class ModelError(MnemosError):
    """A model does not behave as a causal language model must, or its own code failed."""


class CapacityError(MnemosError):
    """There is no room: a queue or a disk is full, a deadline passed, or the pages or the memory are too few."""


class DownloadError(MnemosError):
    """A model could not be fetched or does not have the expected checksum."""


class MissingDependencyError(MnemosError, ImportError):
    """An optional package is not installed; the message names the extra to install."""


@contextmanager
def needing_extra(what: str, extra: str) -> Iterator[None]:
    """Around the imports of an optional part: MissingDependencyError if a package that they need is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mnemos"):
            raise
        raise MissingDependencyError(
            f"{error.name} is not installed; {what}: pip install 'mnemos[{extra}]'", name=error.name
        ) from error


def shown(value: object) -> str:
    """A value as shown in a message: at most 80 characters of its repr."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."
