"""From prompts to their embeddings: the one way on which every protocol's requests for them reach the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mnemos.contract import Floats
from mnemos.engine.value_handle import ValueHandle
from mnemos.errors import MnemosError
from mnemos.serve.catalogue import Served
from mnemos.serve.connection import Connection
from mnemos.serve.generation import exchange_of, salted
from mnemos.serve.refusal import refusal_of
from mnemos.serve.task import Task


async def embeddings(
    model: Served, tasks: Sequence[Task], connection: Connection, pooling: str = "mean"
) -> tuple[list[Floats], int]:
    """The embeddings of prompts, float32 (hidden size,) of length 1, and the number of all their tokens.

    They are computed together, and cancelled when the client goes away. Of the tasks, only the prompts count.
    pooling: see `InferenceEngine.embed`. Refusal for what cannot be embedded; then nothing is.
    """
    try:
        handles = await model.in_thread(_submit, model, tasks, connection, pooling)
        connection.notes["model"] = model.name
        for handle in handles:
            connection.start(handle)
        return [await handle for handle in handles], sum(handle.usage.prompt_tokens for handle in handles)
    except MnemosError as error:
        raise refusal_of(error, dict(tasks[0].names)) from error


def _submit(model: Served, tasks: Sequence[Task], connection: Connection, pooling: str) -> list[ValueHandle[Floats]]:
    caller = connection.caller
    prompts = [exchange_of(model, task).prompt_ids for task in tasks]
    scheduling: dict[str, Any] = {
        "tenant": caller.tenant,
        "cache_salt": salted(caller, None),
        "adapter": model.offer.defaults.get("adapter"),
    }
    return [model.engine.submit_embedding(one, pooling, **scheduling) for one in prompts]
