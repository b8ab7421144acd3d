"""Thin wrappers of the engine for batches and streams, under the names that research code uses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemos.compat.optimized import OptimizedInferenceEngine, generation_fields
from mnemos.decoding.config import GenerationConfig, choose_config
from mnemos.engine.completion import StreamedToken
from mnemos.engine.prompts import listed, read_prompts
from mnemos.errors import RequestError
from mnemos.rules import COUNT

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine


class BatchInference:
    """Generates for prompts of any lengths, at most `batch_size` at once; when one is done, the next starts."""

    def __init__(self, engine: InferenceEngine, batch_size: int = 8, pad_token_id: int | None = None) -> None:
        self.engine = engine
        self.batch_size = COUNT.apply("batch_size", batch_size)
        self.pad_token_id = pad_token_id

    def generate(self, prompts: Sequence[Any], config: GenerationConfig | None = None, **overrides: Any) -> list[Any]:
        """Each prompt's result in the prompt's own form; see `InferenceEngine.generate_batched`."""
        if self.pad_token_id is not None:
            overrides = {"pad_token_id": self.pad_token_id, **overrides}
        wanted = listed(prompts)
        bar = _Bar(len(wanted), self.batch_size)
        chosen = choose_config(config, self.engine.generation_config, **overrides)
        return self.engine.generate_batched(wanted, batch_size=self.batch_size, config=chosen, on_done=bar)


class StreamingInference:
    """Streams tokens as they are generated."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine

    def generate_stream(
        self, prompt: Any, attention_mask: Any = None, config: GenerationConfig | None = None, **overrides: Any
    ) -> Iterator[Any]:
        """For an array or tensor of token ids, (time,) or (1, time), yields such arrays of one id, shape (); for a list
        of ids, NumPy integers; for a text, `StreamedToken`s. RequestError for several results at once."""
        check_one(choose_config(config, self.engine.generation_config, **overrides))
        reading = read_prompts(prompt, attention_mask, self.engine.tokenizer)
        tokens = self.engine.stream(reading.only, config, **overrides)
        if isinstance(prompt, str):
            return tokens
        return _array_tokens(tokens, prompt if hasattr(prompt, "shape") else np.array(prompt))


class ResponseStreamer:
    """Streams a response's text, piece by piece."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine

    def stream_response(self, text: str, config: GenerationConfig | None = None, **overrides: Any) -> Iterator[str]:
        """The pieces add up to the response; each consists of whole characters. For an `OptimizedInferenceEngine`, that
        is the response of its `generate_response`."""
        overrides = generation_fields(overrides)
        check_one(choose_config(config, self.engine.generation_config, **overrides))
        if isinstance(self.engine, OptimizedInferenceEngine) and config is None:
            tokens = self.engine.generate_tokens(text, **overrides)
        else:
            tokens = self.engine.stream(text, config, **overrides)
        return (piece for piece in map(self.decode_token, tokens) if piece)

    def decode_token(self, token: StreamedToken | int) -> str:
        """A token's text within a response: a streamed token's own text, "" while a character is incomplete.

        A token id is decoded alone, with the space before it if it begins a word. RequestError if the engine has no
        tokenizer.
        """
        if isinstance(token, StreamedToken):
            return token.text
        if self.engine.tokenizer is None:
            raise RequestError(f"token {token} cannot be decoded: the engine has no tokenizer; create it with one")
        return self.engine.tokenizer.decode([token], continues=True)


@dataclass(frozen=True)
class BatchRequest:
    """A prompt with a priority (lower is sooner) and its own config."""

    prompt: str | Sequence[int]
    priority: int = 0
    config: GenerationConfig | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


Request = str | Sequence[int] | BatchRequest


class BatchProcessor:
    """Processes many requests: urgent ones first, then equal beginnings together, short before long ones.

    request_queue: requests that other threads have left, for `process_batch` to take.
    """

    def __init__(self, engine: InferenceEngine, batch_size: int = 8) -> None:
        self.engine = engine
        self.batch_size = COUNT.apply("batch_size", batch_size)
        self.request_queue: SimpleQueue[Request] = SimpleQueue()

    def process_batch(
        self,
        requests: Sequence[Request] | None = None,
        config: GenerationConfig | None = None,
        **overrides: Any,
    ) -> list[Any]:
        """Results in the requests' order and form, texts for texts. Without requests: those in `request_queue` now."""
        if requests is None:
            requests = [self.request_queue.get() for _ in range(self.request_queue.qsize())]
        wanted = [one if isinstance(one, BatchRequest) else BatchRequest(one) for one in listed(requests)]
        ids = [read_prompts(request.prompt, None, self.engine.tokenizer).only for request in wanted]
        order = self._order(wanted, ids)
        results = self.engine.generate_batched(
            [wanted[index].prompt for index in order],
            batch_size=self.batch_size,
            config=[self._config_of(wanted[index], config, overrides) for index in order],
            on_done=_Bar(len(order), self.batch_size),
        )
        return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]

    def _config_of(
        self, request: BatchRequest, config: GenerationConfig | None, overrides: Mapping[str, Any]
    ) -> GenerationConfig:
        own = {"priority": request.priority, **overrides, **request.overrides}
        return choose_config(request.config or config, self.engine.generation_config, **own)

    def _order(self, requests: Sequence[BatchRequest], token_ids: Sequence[list[int]]) -> list[int]:
        page = self.engine.spec.layout.page_size
        return sorted(
            range(len(requests)),
            key=lambda index: (requests[index].priority, token_ids[index][:page], len(token_ids[index])),
        )


def check_one(config: GenerationConfig) -> None:
    """RequestError if a config asks for several results where their tokens or texts could not be told apart."""
    if config.num_return_sequences > 1:
        raise RequestError(
            f"num_return_sequences is {config.num_return_sequences}; here a request has one result, see engine.stream "
            "and engine.generate for several"
        )


class _Bar:
    """A progress bar on the terminal for long batches; called after each request."""

    def __init__(self, total: int, batch_size: int) -> None:
        self.total = total
        self.done = 0
        self.shown = total > 2 * batch_size and sys.stderr.isatty()

    def __call__(self) -> None:
        self.done += 1
        if self.shown:
            filled = 30 * self.done // self.total
            end = "\n" if self.done == self.total else ""
            sys.stderr.write(f"\r[{'#' * filled}{'.' * (30 - filled)}] {self.done}/{self.total}{end}")
            sys.stderr.flush()


def _array_tokens(tokens: Iterator[StreamedToken], like: Any) -> Iterator[Any]:
    make: Callable[[int], Any] = like.new_tensor if hasattr(like, "new_tensor") else like.dtype.type
    return (make(token.token_id) for token in tokens if token.token_id is not None)
