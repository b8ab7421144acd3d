"""A request's fields in the engine's terms: OpenAI's own, and what vLLM and llama.cpp add to them."""

from __future__ import annotations

from typing import Any

from mnemos.serve.connection import Connection
from mnemos.serve.generation import extra_fields
from mnemos.serve.openai.types import Extended, GenerationRequest, refuse_impossible
from mnemos.serve.refusal import Refusal

# OpenAI's fields that are the engine's too, by the same name.
SAME = ("temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias")
# Other names of the engine's fields. Further fields with the engine's own name need no row.
RENAMED = {
    "max_tokens": "max_new_tokens",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_last_n",
    "typical": "typical_p",
}
# The members of vLLM's structured_outputs.
STRUCTURES = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
ANY_OBJECT = {"type": "object"}
# What decides the kind of decoding.
DECODING = ("temperature", "do_sample", "strategy", "num_beams", "penalty_alpha")


def fields_of(body: Extended, connection: Connection) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of GenerationConfig that a request sets, and the request's names of those that it calls differently.

    Refusal for a field that is misspelt, set twice under two names, or cannot be honoured.
    """
    declared = type(body).model_fields
    fields = extra_fields(refuse_impossible(body), tuple(declared), connection)
    fields |= body.given(*[name for name in SAME if name in declared])
    names: dict[str, str] = {}
    for name, value in body.given(*[name for name in RENAMED if name in declared]).items():
        _put(fields, names, RENAMED[name], value, name)
    if body.structured_outputs is not None:
        _structure(fields, names, body.structured_outputs)
    if isinstance(body, GenerationRequest) and body.response_format is not None:
        respond_in(fields, names, body.response_format, "response_format")
    if body.truncate_prompt_tokens == -1:
        fields.setdefault("overflow", "truncate_left")
    results = max(_whole(fields, "n"), _whole(fields, "num_return_sequences"), _whole(fields, "best_of"))
    if body.use_beam_search:
        fields.setdefault("num_beams", max(results, 2))
        fields.pop("best_of", None)
        if fields.get("temperature") == 0:  # vLLM's clients send it with beams
            del fields["temperature"]
    elif results > 1 and not any(fields.get(name) is not None for name in DECODING):
        fields["temperature"] = 1.0  # OpenAI's default: several different texts need sampling
    return fields, names


def kept(body: Extended) -> int | None:
    """How many tokens of the prompt are kept, or None for all."""
    keep = body.truncate_prompt_tokens
    return None if keep is None or keep < 1 else keep


def respond_in(fields: dict[str, Any], names: dict[str, str], wanted: dict[str, Any], label: str) -> None:
    """Adds the constraint of OpenAI's `response_format`, which errors call `label`.

    A bare `schema` beside json_object is llama.cpp's. Refusal for a type that is unknown, and for a missing schema.
    """
    kind = wanted.get("type")
    if kind == "json_object":
        _constrain(fields, names, wanted.get("schema", ANY_OBJECT), f"{label}.schema")
    elif kind == "json_schema":
        described = wanted.get("json_schema")
        inner = f"{label}.json_schema"
        if described is None:  # in /v1/responses, the schema stands beside the type
            described, inner = wanted, label
        described = described if isinstance(described, dict) else {}
        _constrain(fields, names, described.get("schema"), f"{inner}.schema")
        if described.get("strict") is True:
            _put(fields, names, "strict", True, f"{inner}.strict")
    elif kind != "text":
        raise Refusal(
            400,
            f"{label}.type is {str(kind)[:80]!r}; it must be text, json_object or json_schema",
            param=f"{label}.type",
        )


def _constrain(fields: dict[str, Any], names: dict[str, str], schema: Any, name: str) -> None:
    if not isinstance(schema, (dict, bool)):
        raise Refusal(
            400, f"{name} is {'missing' if schema is None else str(schema)[:80]}; it must be a JSON schema", param=name
        )
    _put(fields, names, "json_schema", schema, name)


def _structure(fields: dict[str, Any], names: dict[str, str], wanted: dict[str, Any]) -> None:
    """vLLM's `structured_outputs`."""
    asked = [name for name in (*STRUCTURES, "json_object") if wanted.get(name) not in (None, False)]
    if not asked:
        raise Refusal(
            400,
            f"structured_outputs has {', '.join(map(str, wanted))[:80] or 'nothing'}; it must have one of "
            f"{', '.join(STRUCTURES)}, json_object",
            param="structured_outputs",
        )
    for name in asked:
        own, value = (STRUCTURES[name], wanted[name]) if name in STRUCTURES else ("json_schema", ANY_OBJECT)
        _put(fields, names, own, value, f"structured_outputs.{name}")


def _put(fields: dict[str, Any], names: dict[str, str], own: str, value: Any, name: str) -> None:
    if own in fields:
        raise Refusal(400, f"{name} and {names.get(own, own)} are both set; leave one of them out", param=name)
    fields[own], names[own] = value, name


def _whole(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 1
