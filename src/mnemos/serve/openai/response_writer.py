"""An answer as a response object of `/v1/responses`, and as the typed events by which it grows."""

from __future__ import annotations

import time
from typing import Any

from mnemos.engine.answers import AnswerEvent, CallPiece, CallStart, End, Piece
from mnemos.engine.completion import Usage
from mnemos.serve.openai.shapes import logprob_entries, new_id
from mnemos.serve.refusal import Refusal
from mnemos.serve.streams import encode
from mnemos.text.tokenizer import Tokenizer


class ResponseWriter:
    """Collects an answer's items; each method returns the stream's events that belong to what it does.

    head   what the response repeats of the request
    top    the number of alternatives to report for each token, or None for no log probabilities
    """

    def __init__(self, head: dict[str, Any], tokenizer: Tokenizer | None, top: int | None) -> None:
        self.id = new_id("resp_")
        self.output: list[dict[str, Any]] = []
        self._head = head
        self._tokenizer = tokenizer
        self._top = top
        self._created = int(time.time())
        self._open: dict[str, Any] | None = None  # the last item, while it grows
        self._text: list[str] = []  # of the open item
        self._logprobs: list[dict[str, Any]] = []
        self._thought = 0
        self._end: End | None = None
        self._sent = 0

    def begin(self) -> str:
        """The first events."""
        response = self.response(None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def add(self, event: AnswerEvent) -> str:
        """The events that one of the answer's becomes."""
        match event:
            case Piece(_, text, tokens, "reasoning"):
                self._thought += len(tokens)
                return self._grow("reasoning", text) if text else ""
            case Piece(_, text, tokens):
                entries = []
                if self._top is not None and self._tokenizer is not None:
                    entries = logprob_entries(tokens, self._tokenizer, self._top)
                return self._grow("message", text, entries) if text or entries else ""
            case CallStart(_, _, call_id, name):
                return self._close("completed") + self._begin_call(call_id, name)
            case CallPiece(_, _, text):
                self._text.append(text)
                return self._inside("response.function_call_arguments.delta", delta=text)
            case End(_, reason):
                self._end = event
                empty = "" if self.output else self._grow("message", "")
                return empty + self._close("incomplete" if reason in CUT else "completed")

    def end(self, usage: Usage) -> tuple[dict[str, Any], str]:
        """The finished response, and the stream's last event."""
        response = self.response(usage)
        return response, self._event(f"response.{response['status']}", response=response)

    def fail(self, refusal: Refusal) -> str:
        """The last event of a stream that fails after its beginning."""
        error = {"code": refusal.code or "server_error", "message": refusal.message}
        return self._event("response.failed", response={**self.response(None), "status": "failed", "error": error})

    def response(self, usage: Usage | None) -> dict[str, Any]:
        """The response object. usage: None while the answer grows."""
        end = self._end
        status = "in_progress" if end is None else "incomplete" if end.reason in CUT else "completed"
        error = None if end is None or end.error is None else {"code": "server_error", "message": end.error}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None if status != "completed" or error else int(time.time()),
            "status": "failed" if error else status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **self._head,
            "output": [*self.output],
            "usage": None if usage is None else usage_of(usage, self._thought),
        }

    def _grow(self, kind: str, text: str, logprobs: list[dict[str, Any]] | None = None) -> str:
        """Adds text to the open item, which is a new one if the last is of another kind."""
        events = ""
        if self._open is None or self._open["type"] != kind:
            events = self._close("completed") + self._begin(kind)
        self._text.append(text)
        self._logprobs += logprobs or []
        if kind == "reasoning":
            return events + self._inside("response.reasoning_text.delta", delta=text, content_index=0)
        if not text and not logprobs:
            return events
        return events + self._inside("response.output_text.delta", delta=text, content_index=0, logprobs=logprobs or [])

    def _begin(self, kind: str) -> str:
        """Opens a message or a reasoning item, with its only part."""
        if kind == "message":
            item: dict[str, Any] = {"type": kind, "id": new_id("msg_"), "status": "in_progress", "role": "assistant"}
        else:
            item = {"type": kind, "id": new_id("rs_"), "status": "in_progress", "summary": []}
        added = self._item_added({**item, "content": []})
        return added + self._inside("response.content_part.added", content_index=0, part=self._part("", []))

    def _begin_call(self, call_id: str, name: str) -> str:
        item = {"type": "function_call", "id": new_id("fc_"), "status": "in_progress", "call_id": call_id, "name": name}
        return self._item_added({**item, "arguments": ""})

    def _item_added(self, item: dict[str, Any]) -> str:
        self._open, self._text, self._logprobs = item, [], []
        self.output.append(item)
        return self._event("response.output_item.added", output_index=len(self.output) - 1, item=item)

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._open is not None and self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _close(self, status: str) -> str:
        """Finishes the open item, if there is one."""
        item = self._open
        if item is None:
            return ""
        text = "".join(self._text)
        if item["type"] == "function_call":
            done = {**item, "arguments": text, "status": status}
            events = self._inside("response.function_call_arguments.done", arguments=text, name=item["name"])
        else:
            part = self._part(text, self._logprobs)
            done = {**item, "content": [part], "status": status}
            kind = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            more = {} if item["type"] == "reasoning" else {"logprobs": self._logprobs}
            events = self._inside(f"response.{kind}.done", content_index=0, text=text, **more)
            events += self._inside("response.content_part.done", content_index=0, part=part)
        self.output[-1], self._open = done, None
        return events + self._event("response.output_item.done", output_index=len(self.output) - 1, item=done)

    def _inside(self, kind: str, **content: Any) -> str:
        """An event of the open item."""
        return self._event(kind, item_id=self.output[-1]["id"], output_index=len(self.output) - 1, **content)

    def _event(self, kind: str, **content: Any) -> str:
        event = {"type": kind, "sequence_number": self._sent, **content}
        self._sent += 1
        return f"event: {kind}\ndata: {encode(event)}\n\n"


# Why a result ended before it was complete.
CUT = ("length", "time", "cancelled")


def usage_of(usage: Usage, thought: int) -> dict[str, Any]:
    """Numbers of tokens, with the `thought` ones of reasoning."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": usage.total_tokens,
    }
