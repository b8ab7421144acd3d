"""YAML as configs of training scripts use it: numbers as in YAML 1.2, and ${other.field} for another field's value."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from mnemos.errors import FormatError, MissingDependencyError, UnsupportedError

LARGEST_FILE = 10**7  # bytes
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")


def read_yaml(path: Path) -> Any:
    """The file's content with all references resolved. FormatError if it cannot be read or is no valid YAML."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise FormatError(f"{path}: has {size} bytes; a config has at most {LARGEST_FILE}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read: {error}; expected a YAML file") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path | str) -> Any:
    """The content of a YAML text; `path` is named in errors."""
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(f"{path}: reading YAML needs PyYAML: pip install 'mnemos[memory]'") from error
    try:
        content = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: is not valid YAML: {reason}") from error
    return _resolved(content, content, path, ())


@cache
def _loader() -> Any:
    """PyYAML's safe loader, without aliases (which can make a small file huge), for which 1e-6 is a number."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined, unused-ignore]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise yaml.YAMLError(f"alias *{event.anchor} is not allowed; write the value again")
            return super().compose_node(parent, index)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    return Loader


def _resolved(value: Any, root: Any, path: Path | str, open_names: tuple[str, ...]) -> Any:
    """The value with the values of the fields that it refers to."""
    if isinstance(value, dict):
        return {key: _resolved(entry, root, path, open_names) for key, entry in value.items()}
    if isinstance(value, list):
        return [_resolved(entry, root, path, open_names) for entry in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole:
        return _looked_up(whole[1], root, path, open_names)
    return _REFERENCE.sub(lambda match: str(_looked_up(match[1], root, path, open_names)), value)


def _looked_up(name: str, root: Any, path: Path | str, open_names: tuple[str, ...]) -> Any:
    name = name.strip()
    if ":" in name or name.startswith("."):
        raise UnsupportedError(f"{path}: ${{{name}}} is not supported; expected the full name of a field: ${{model.x}}")
    if name in open_names:
        raise FormatError(f"{path}: ${{{name}}} refers to itself; expected a field with a value")
    value = root
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise FormatError(f"{path}: ${{{name}}} names no field of the file")
        value = value[part]
    return _resolved(value, root, path, (*open_names, name))
