"""How a model is loaded and how an engine runs it: each option once, with its rule, default and help text.

The constructors, the command line and the documents' tables are made from these classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypedDict

from mnemos.errors import ConfigError
from mnemos.rules import COUNT, DTYPE, FLAG, KV_DTYPE, PERFORMANCE_MODE, Rule, hint, real

if TYPE_CHECKING:
    from typing_extensions import Self

    from mnemos.decoding.config import AnyConfig, GenerationConfig
    from mnemos.decoding.memory import Memory
    from mnemos.hub.cache import Progress
    from mnemos.memory.response_cache import ResponseCache

TRANSFORMERS = "transformers"
BACKENDS = ("auto", "native", "numpy", "torch", TRANSFORMERS)
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "npu")


def _backend(value: Any) -> str | None:
    name, colon, device = value.partition(":") if isinstance(value, str) else ("", "", "")
    placed = name in ("torch", TRANSFORMERS) and _device(device) is not None
    return value if name in BACKENDS and (placed or not colon) else None


def _device(value: Any) -> str | None:
    name = str(value) if type(value).__name__ == "device" else value  # a torch.device
    return name if isinstance(name, str) and re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", name) else None


def _config(value: Any) -> Any:
    from mnemos.decoding.config import as_config, is_config  # imported late: the weights are being read meanwhile

    return as_config(value) if is_config(value) else None


def _memory(value: Any) -> Memory | None:
    from mnemos.decoding.memory import Memory

    return Memory.read(value)


def _adapters(value: Any) -> Any:
    named = isinstance(value, Mapping) and all(isinstance(name, str) and name for name in value)
    return dict(value) if named and all(isinstance(one, (str, os.PathLike)) for one in value.values()) else None


def _answers(value: Any) -> ResponseCache | None:
    from mnemos.memory.response_cache import ResponseCache

    if type(value) is int and value > 0:
        return ResponseCache(value)
    return value if isinstance(value, ResponseCache) else None


ANYTHING = Rule(lambda value: value, "anything")
BACKEND = Rule(_backend, f"one of {', '.join(BACKENDS)}; torch and {TRANSFORMERS} may name a device, like torch:cuda")
DEVICE = Rule(_device, f"one of {', '.join(DEVICES)}, also with a number, like cuda:1")
PATH = Rule(lambda value: value if isinstance(value, (str, os.PathLike)) else None, "a name or a path")
ADAPTERS = Rule(_adapters, "folders by names that are not empty, like {'sql': 'lora/'}")
PROGRESS = Rule(lambda value: value if callable(value) else None, "a callable (stage, done, total)")
MEMORY = Rule(_memory, "a Memory, its fields, or a text like 'window=512,recall=480,sinks=32'")
ANSWERS = Rule(_answers, "a ResponseCache, or a whole number of at least 1")
CONFIG = Rule(_config, "a GenerationConfig, or a dict of its fields")
GIGABYTES = real(0, 1 << 20, open_low=True)
_SHARED = ("max_memory_gb", "performance_mode", "thermal_throttle")  # for loading and for running


def row(rule: Rule, help: str, metavar: str | None = None) -> dict[str, Any]:
    """An option's metadata: its rule, what it does, and the name of its value on the command line.

    Without `metavar` the option is for Python only; an empty one marks a flag.
    """
    return {"rule": rule, "help": help, "metavar": metavar}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Values that are validated on creation: ConfigError for one that is not allowed and for an unknown name."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.default is not None:
                object.__setattr__(self, one.name, one.metadata["rule"].apply(one.name, value))

    @classmethod
    def names(cls) -> list[str]:
        """The options' names, in the order of their declaration."""
        return [one.name for one in fields(cls)]

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """The options with these values. ConfigError for an unknown name, with the most similar known one."""
        refuse_unknown(values, cls.names())
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Options for any model, whether loaded from a file or given as a module in memory."""

    context_length: int | None = field(
        default=None, metadata=row(COUNT, "the maximum length of a sequence in tokens; by default the model's own", "N")
    )
    device: str | None = field(
        default=None, metadata=row(DEVICE, "cpu, or a PyTorch device such as cuda; auto: the best one", "NAME")
    )
    memory: Memory | None = field(
        default=None,
        metadata=row(
            MEMORY,
            "what rows of long texts see: sinks, a window and the pages that they recall, like "
            "window=512,recall=480,sinks=32; with it, context_length may exceed the model's own",
            "POLICY",
        ),
    )
    use_kv_cache: bool = field(
        default=True, metadata=row(FLAG, "False: a PyTorch module is run over the whole text for every token")
    )
    max_memory_gb: float | None = field(
        default=None,
        metadata=row(
            GIGABYTES, "memory that the process may take (GB of 2^30 bytes), weights, cache and all the rest", "GB"
        ),
    )
    performance_mode: str | None = field(
        default=None,
        metadata=row(
            PERFORMANCE_MODE, "performance, balanced (performance cores only) or efficiency (half of them)", "MODE"
        ),
    )
    thermal_throttle: bool = field(
        default=False,
        metadata=row(
            FLAG, "use fewer threads and smaller batches, and pause, while the machine is hot or on battery", ""
        ),
    )


@dataclass(frozen=True, kw_only=True)
class LoadOptions(ModelOptions):
    """How `InferenceEngine.from_pretrained` loads a model."""

    backend: str = field(
        default="auto", metadata=row(BACKEND, "native (default), torch, transformers, or numpy, the reference", "NAME")
    )
    dtype: str = field(
        default="auto",
        metadata=row(DTYPE, "auto: weights as stored; float32: expanded; bfloat16, float16: with PyTorch", "TYPE"),
    )
    kv_dtype: str = field(
        default="auto",
        metadata=row(KV_DTYPE, "the key/value cache's type: auto, float32, float16, bfloat16 or int8", "TYPE"),
    )
    threads: int | None = field(
        default=None, metadata=row(COUNT, "threads to compute with; by default one per usable core", "N")
    )
    tokenizer: Any = field(
        default=None,
        metadata=row(ANYTHING, "a tokenizer, or the path of its file or folder, instead of the model's own", "PATH"),
    )
    draft: str | os.PathLike[str] | None = field(
        default=None,
        metadata=row(
            PATH, "a small model with the same vocabulary that drafts tokens for the large one to verify", "MODEL"
        ),
    )
    adapter: str | os.PathLike[str] | None = field(
        default=None,
        metadata=row(PATH, "a LoRA folder as peft saves it, merged into the weights while they are loaded", "FOLDER"),
    )
    adapters: Mapping[str, str | os.PathLike[str]] | None = field(
        default=None,
        metadata=row(ADAPTERS, "LoRA folders by name that stay beside the weights, one for each request that names it"),
    )
    trust_remote_code: bool = field(default=False, metadata=row(FLAG, "run Python code from the model's folder", ""))
    progress: Progress | None = field(
        default=None, metadata=row(PROGRESS, "called as f(stage, done, total) while a model is fetched")
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions(ModelOptions):
    """How an `InferenceEngine` runs its model."""

    max_batch_tokens: int = field(
        default=512,
        metadata=row(COUNT, "most rows of a step with part of a prompt; fewer: smoother streams, slower prompts"),
    )
    max_sequences: int = field(default=64, metadata=row(COUNT, "most branches (such as beams) that run at once"))
    cache_tokens: int | None = field(
        default=None,
        metadata=row(
            COUNT,
            "positions that the key/value cache holds for all requests together; memory is taken as it is used. By "
            "default, room for two full contexts, at least 65,536, in a quarter of free memory",
        ),
    )
    prefix_cache: bool = field(
        default=True, metadata=row(FLAG, "keep keys and values for later requests with the same beginning")
    )
    queue_size: int = field(
        default=1024, metadata=row(COUNT, "most requests that may wait; more are refused with CapacityError")
    )
    draft_model: Any = field(
        default=None,
        metadata=row(ANYTHING, "a small model or nn.Module with the same vocabulary, for speculative='draft'"),
    )
    response_cache: ResponseCache | None = field(
        default=None,
        metadata=row(ANSWERS, "a ResponseCache, or how many answers are kept for requests that would get them again"),
    )
    session_dir: str | os.PathLike[str] | None = field(
        default=None, metadata=row(PATH, "the folder of sessions; by default one in the user's state folder")
    )
    generation_config: GenerationConfig | None = field(
        default=None, metadata=row(CONFIG, "the config of requests that have none; their keywords override its fields")
    )


class EngineKeywords(TypedDict, total=False):
    """The options of `EngineOptions` that `InferenceEngine` takes as keywords, for editors and type checkers."""

    context_length: int | None
    max_memory_gb: float | None
    performance_mode: str | None
    thermal_throttle: bool
    memory: Any
    max_batch_tokens: int
    max_sequences: int
    cache_tokens: int | None
    prefix_cache: bool
    queue_size: int
    draft_model: Any
    response_cache: ResponseCache | int | None
    session_dir: str | os.PathLike[str] | None
    generation_config: AnyConfig | None


class LoadKeywords(EngineKeywords, total=False):
    """The keywords of `InferenceEngine.from_pretrained`, for editors and type checkers."""

    device: str | None
    use_kv_cache: bool
    backend: str
    dtype: str
    kv_dtype: str
    threads: int | None
    tokenizer: Any
    draft: str | os.PathLike[str] | None
    adapter: str | os.PathLike[str] | None
    adapters: Mapping[str, str | os.PathLike[str]] | None
    trust_remote_code: bool
    progress: Progress | None


def split(keywords: Mapping[str, Any]) -> tuple[LoadOptions, dict[str, Any]]:
    """(how to load a model, keywords for the engine that runs it), both checked; see `Options.read` for errors."""
    refuse_unknown(keywords, [*LoadOptions.names(), *EngineOptions.names()])
    loading = {name: value for name, value in keywords.items() if name in LoadOptions.names()}
    running = {name: value for name, value in keywords.items() if name not in loading or name in _SHARED}
    EngineOptions(**running)
    if loading.get("draft") is not None and running.get("draft_model") is not None:
        raise ConfigError(f"draft is {str(loading['draft'])!r} and draft_model is given too; give one of them")
    return LoadOptions(**loading), running


def refuse_unknown(names: Mapping[str, Any], known: list[str]) -> None:
    """Raises ConfigError for the first unknown name."""
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{name} is not an option of the engine; {hint(name, list(dict.fromkeys(known)), 'the options')}"
            )


def command_line(kind: type[Options]) -> list[Field[Any]]:
    """The options of the command line, in the order of their declaration."""
    return [one for one in fields(kind) if one.metadata["metavar"] is not None]


def table(kind: type[Options]) -> str:
    """The options as a Markdown table: name, default, meaning."""
    rows = [f"| `{one.name}` | `{one.default!r}` | {one.metadata['help']} |" for one in fields(kind)]
    return "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows])
