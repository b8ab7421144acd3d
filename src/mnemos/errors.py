"""The one hierarchy of exceptions that Mnemos raises on purpose.

A message names the thing that is wrong, its value, and what would be right, in that order.
"""


class MnemosError(Exception):
    """Root of every error that Mnemos raises on purpose."""


class FormatError(MnemosError):
    """A file (GGUF, safetensors, config, tokenizer, cache) is missing, truncated, corrupt or of an unknown kind."""


class UnsupportedError(MnemosError):
    """What was asked for is well formed but not supported; the message lists what is."""


class ConfigError(MnemosError, ValueError):
    """A parameter lies outside its meaning: the message gives the field, the value and the rule."""


class RequestError(MnemosError, ValueError):
    """A request cannot be run: an empty prompt, a token id out of range."""


class ContextLengthError(RequestError):
    """A prompt does not fit into the model's context; the message says by how much."""


class ModelError(MnemosError):
    """A model does not do what a causal language model must, or its own code failed."""


class CapacityError(MnemosError):
    """There is no room: the queue is full, a deadline passed, or the page pool or the machine's memory is too small."""


class DownloadError(MnemosError):
    """A model could not be fetched or does not have the expected checksum."""


class MissingDependencyError(MnemosError, ImportError):
    """An optional package is not installed; the message says which extra brings it."""


def shown(value: object) -> str:
    """A value as a message shows it: its repr, at most 80 characters of it."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."
