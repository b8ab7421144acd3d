"""Why a request is not answered: one kind of error for all protocols, each of which writes it in its own form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

from mnemos.errors import (
    CapacityError,
    ConfigError,
    ContextLengthError,
    MissingDependencyError,
    MnemosError,
    RequestError,
    UnsupportedError,
)

# Status codes, with OpenAI's and Anthropic's names for what went wrong.
OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
OTHERS = ("messages", "tools", "tool_choice", "prompt", "session")  # fields that errors name, besides the engine's
LONGEST_MESSAGE = 2000
MOST_PROBLEMS = 3  # of a request that are named in one error
_PATH = re.compile(r"(?<![\w.:/<])(?:/[\w.@+\-]+){2,}/?|\b[A-Za-z]:\\[\w.\\@+\- ]+")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")


class Refusal(Exception):
    """A request that gets an error instead of an answer.

    status: of HTTP. param: the field that is wrong, if it is one. code: a fixed name that programs can test.
    retry_after: seconds after which another attempt makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = public(message)
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self, path: str) -> dict[str, Any]:
        """The error in the form of the protocol that the path belongs to."""
        if path.startswith("/api/"):
            return {"error": self.message}
        if path.startswith("/v1/messages"):
            kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        kind = OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that belong to the error."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def public(message: str) -> str:
    """A message without file paths and memory addresses, of bounded length."""
    text = _ADDRESS.sub("(address)", _PATH.sub("(path)", message))
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 3] + "..."


def refusal_of(error: BaseException, names: dict[str, str] | None = None) -> Refusal:
    """The refusal for an error of the engine; what the server itself did wrong says nothing about its inside.

    names: the names of the engine's fields in the protocol, where they differ.
    """
    if isinstance(error, Refusal):
        return error
    message = str(error)
    if isinstance(error, ContextLengthError):
        return Refusal(
            400,
            f"This model's maximum context length is exceeded: {message}",
            param=(names or {}).get("prompt", "messages"),
            code="context_length_exceeded",
        )
    if isinstance(error, MissingDependencyError):
        return Refusal(501, message, code="missing_dependency")
    if isinstance(error, (ConfigError, RequestError, UnsupportedError)):
        field = _field(message)
        if not field and message.startswith("the prompt"):
            return Refusal(400, message, param=(names or {}).get("prompt", "messages"), code="invalid_value")
        name = (names or {}).get(field, field)
        if name != field:
            message = name + message[len(field) :]
        return Refusal(400, message, param=name or None, code="invalid_value" if name else None)
    if isinstance(error, CapacityError) and isinstance(error.__cause__, OSError):  # a full disk: no retry helps
        return Refusal(507, message, code="no_room")
    if isinstance(error, CapacityError):
        return Refusal(429, message, code="capacity", retry_after=1)
    if isinstance(error, MnemosError):
        return Refusal(500, f"the model failed on this request: {message}", code="model_error")
    return Refusal(500, "the server failed on this request; its log names the cause", code="internal_error")


def _field(message: str) -> str:
    """The name of the field that an error's message begins with, or an empty text."""
    from mnemos.decoding.fields import ALIASES, RULES

    found = re.match(r"[a-z_]+", message)
    name = found.group() if found else ""
    return name if name in RULES or name in ALIASES or name in OTHERS else ""


def invalid(problems: Iterable[Any]) -> Refusal:
    """What a body lacks or has wrong: the first problems, with the fields' names and short values."""
    sentences, first = [], None
    for problem in islice(problems, MOST_PROBLEMS):
        where = [str(part) for part in problem["loc"] if part != "body"]
        # pydantic adds the alternatives of a union that it tried; names of fields are lower case words or numbers
        name = (
            ".".join(part for part in where if part.replace("_", "").isalnum() and part == part.lower()) or "the body"
        )
        first = first or (name[:200] if where else None)
        value = repr(problem.get("input"))
        shown = "" if problem["type"] == "missing" else f" (it is {value if len(value) <= 60 else value[:57] + '...'})"
        sentences.append(f"{name[:200]}: {problem['msg'][:200]}{shown}")
    return Refusal(400, "; ".join(sentences), param=first, code="invalid_value")
