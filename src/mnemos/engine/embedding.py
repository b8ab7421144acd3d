"""A text's embedding while it is computed."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from mnemos.errors import MnemosError, UnsupportedError
from mnemos.rules import one_of

if TYPE_CHECKING:
    from mnemos.contract import Floats, ModelSpec
    from mnemos.decoding.forced import ForcedEmbedding
    from mnemos.engine.completion import Completion
    from mnemos.engine.handle import RequestHandle

POOLING = one_of("mean", "last")


def check_embedding(spec: ModelSpec, pooling: str) -> None:
    """UnsupportedError for a model that shows no hidden states, ConfigError for an unknown pooling."""
    POOLING.apply("pooling", pooling)
    if not spec.hidden_size:
        raise UnsupportedError(
            f"{spec.architecture} shows no hidden states, of which an embedding is made; a module needs an "
            "nn.Linear whose output its logits are"
        )


class EmbeddingHandle:
    """A submitted embedding: wait for `result()` or, in asyncio, `await` it. Dropping it cancels it."""

    def __init__(self, handle: RequestHandle, strategy: ForcedEmbedding, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens  # the number of the text's tokens
        self._handle = handle
        self._strategy = strategy

    @property
    def done(self) -> bool:
        """True once it has ended, successfully or not."""
        return self._handle.done

    def cancel(self) -> None:
        """Ends the work within one step."""
        self._handle.cancel()

    def result(self) -> Floats:
        """float32 (hidden size,). Raises the request's error; MnemosError if it was cancelled."""
        return self._embedding(self._handle.result())

    def __await__(self) -> Generator[Any, None, Floats]:
        return self._embedding((yield from self._handle.__await__()))

    def _embedding(self, completion: Completion) -> Floats:
        if completion.finish_reason == "cancelled":
            raise MnemosError("the embedding was cancelled before it was done")
        return self._strategy.embedding
