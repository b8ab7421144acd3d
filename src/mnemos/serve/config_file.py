"""A TOML file with everything that `mnemos serve` takes: settings, models and their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mnemos.decoding.config import GenerationConfig
from mnemos.engine.engine import InferenceEngine
from mnemos.engine.options import EngineOptions, LoadOptions, split
from mnemos.errors import ConfigError
from mnemos.rules import hint, several, text
from mnemos.serve.catalogue import FOREVER, Offer
from mnemos.serve.settings import SECONDS, Settings
from mnemos.serve.toml import parse_toml

Load = Callable[..., InferenceEngine]
_MODEL = ("name", "source", "aliases", "keep_alive", "generation")
_OPTIONS = tuple(
    name
    for name in (*LoadOptions.names(), *EngineOptions.names())
    if name not in ("progress", "draft_model", "generation_config")
)


@dataclass(frozen=True)
class ServerFile:
    """What a file says: settings, models in their order, the default one, and the file of keys."""

    settings: dict[str, Any]
    offers: list[Offer]
    default: str | None
    api_key_file: str | None


def read_server_file(path: Path, load: Load) -> ServerFile:
    """Reads a configuration. ConfigError for anything unknown or wrong, with the place in the file.

    The top level holds the settings, `default` and `api_key_file`; each `[[models]]` table holds `source`, and may hold
    `name`, `aliases`, `keep_alive`, options of the engine, and a table `generation` with defaults for its requests.
    load: makes an engine from a source and options.
    """
    content = parse_toml(path.read_text(encoding="utf-8"), path)
    names = [one.name for one in fields(Settings)]
    known = [*names, "default", "api_key_file", "models"]
    for name in content:
        if name not in known:
            raise ConfigError(f"{path}: {name} is unknown; {hint(name, known, 'the names are')}")
    tables = content.get("models", [])
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"{path}: there is no [[models]] table; each needs a source")
    default, key_file = (content.get(name) for name in ("default", "api_key_file"))
    for name, value in (("default", default), ("api_key_file", key_file)):
        if value is not None:
            text(4096).apply(name, value)
    settings = {name: content[name] for name in names if name in content}
    return ServerFile(settings, [_offer(table, n, path, load) for n, table in enumerate(tables, 1)], default, key_file)


def _offer(table: Any, number: int, path: Path, load: Load) -> Offer:
    where = f"{path}: models[{number}]"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is not a table")
    known = (*_MODEL, *_OPTIONS)
    for name in table:
        if name not in known:
            raise ConfigError(f"{where}.{name} is unknown; {hint(name, known, 'the names are')}")
    if not isinstance(table.get("source"), str):
        raise ConfigError(f"{where}.source is missing; it is a known name, a file or a folder")
    source = table["source"]
    generation = table.get("generation", {})
    if not isinstance(generation, Mapping):
        raise ConfigError(f"{where}.generation is not a table of generation fields")
    GenerationConfig(**generation)  # refuses what is wrong now rather than at each request
    options = {name: table[name] for name in _OPTIONS if name in table}
    keep_alive = SECONDS.apply(f"{where}.keep_alive", table["keep_alive"]) if "keep_alive" in table else FOREVER
    aliases = several(text(255), 64).apply(f"{where}.aliases", table.get("aliases", ()))
    return offer(source, table.get("name"), options, load, aliases=aliases, keep_alive=keep_alive, defaults=generation)


def offer(
    source: str,
    name: str | None,
    options: Mapping[str, Any],
    load: Load,
    *,
    aliases: tuple[str, ...] = (),
    keep_alive: float = FOREVER,
    defaults: Mapping[str, Any] | None = None,
) -> Offer:
    """The offer of a model that is loaded from `source` with these options of the engine, which are checked now."""
    split(options)
    if name is None:
        is_path = "/" in source or "\\" in source or source.endswith((".gguf", ".tar"))
        is_path = is_path and not source.startswith("hf:")
        name = Path(source).name.removesuffix(".gguf").removesuffix(".tar") if is_path else source
    text(255).apply("name", name)
    return Offer(
        name,
        lambda: load(source, **options),
        aliases=aliases,
        defaults=dict(defaults or {}),
        keep_alive=keep_alive,
        source=source,
        adapters=tuple(options.get("adapters") or ()),
    )
