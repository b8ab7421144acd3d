"""Generation options on the command line: one for every field of GenerationConfig, made from its row.

Functions are the only kind of value that a command line cannot express: `logits_processors`,
`prefix_allowed_tokens_fn` and `stopping_criteria` have no option.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mnemos.cli.options import add_draft_argument
from mnemos.decoding.fields import FIELDS, GROUPS, Field
from mnemos.errors import ConfigError

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig

# Of a command with one model, --adapter merges the adapter as the model is loaded, and --memory is the engine's.
_OF_THE_ENGINE = ("adapter", "memory")
OPTIONS = tuple(
    field for field in FIELDS if (field.rule.item or field.rule).kind != "callable" and field.name not in _OF_THE_ENGINE
)
_METAVARS = {"integer": "N", "number": "X"}


def flag(field: Field) -> str:
    """The option's name."""
    return "--" + field.name.replace("_", "-")


def add_generation_arguments(parser: argparse.ArgumentParser, *, results: bool) -> None:
    """Adds --draft and an option for each field; unset ones stay None. Options on whole results only with `results`."""
    for group, title in GROUPS.items():
        if group == "results" and not results:
            continue
        section = parser.add_argument_group(title + (" (with --json)" if group == "results" else ""))
        for field in OPTIONS:
            if field.group == group:
                help_text = (field.help[0].lower() + field.help[1:].removesuffix(".")).replace("%", "%%")
                how = _how_to_parse(field)
                again = "; may be repeated" if how.get("action") == "append" else ""
                section.add_argument(flag(field), help=help_text + again, **how)
        if group == "speed":
            add_draft_argument(section)


def generation_config(arguments: argparse.Namespace) -> GenerationConfig:
    """The config; ConfigError for values that are not allowed."""
    from mnemos.decoding.config import GenerationConfig

    values: dict[str, Any] = {field.name: getattr(arguments, field.name, None) for field in OPTIONS}
    if values["logit_bias"] is not None:
        values["logit_bias"] = {",".join(map(str, tokens)): amount for tokens, amount in values["logit_bias"]}
    draft, how = getattr(arguments, "draft", None), values["speculative"]
    if draft is not None:
        if how not in (None, "draft"):
            raise ConfigError(f"--speculative is {how!r} and --draft {draft!r}; with a draft model it must be 'draft'")
        values["speculative"] = "draft"
    elif how == "draft":
        raise ConfigError("--speculative is 'draft' and there is no draft model; name one with --draft MODEL")
    return GenerationConfig(**values)


def _how_to_parse(field: Field) -> dict[str, Any]:
    rule = field.rule
    named = {"metavar": field.metavar or _METAVARS.get(rule.kind, "TEXT")}
    match rule.kind:
        case "flag" if field.default is not False:
            return {"action": argparse.BooleanOptionalAction}
        case "flag":
            return {"action": "store_true", "default": None}
        case "integer":
            return {"type": int, **named}
        case "number":
            return {"type": float, **named}
        case "flag or name":
            return {"type": _flag_or_name, **named}
        case "mapping":
            return {"type": _bias, "action": "append", **named}
        case "pair":
            return {"type": _pair, **named}
        case "list" if rule.item is not None and rule.item.kind == "integer":
            return {"type": _token_ids, "action": "extend", **named}
        case "list" if rule.item is not None and rule.item.kind == "list":
            return {"type": _token_ids, "action": "append", **named}
        case "list":
            return {"action": "append", **named}
        case _:
            return named


def _flag_or_name(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 5,7") from None


def _bias(text: str) -> tuple[list[int], float]:
    tokens, _, amount = text.partition("=")
    try:
        return _token_ids(tokens), float(amount)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a bias such as 5=-1.5 or, for sequences, 5,7=-1.5") from None


def _pair(text: str) -> tuple[int, float]:
    first, _, second = text.partition(",")
    try:
        return int(first), float(second)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a pair such as 100,1.05") from None
