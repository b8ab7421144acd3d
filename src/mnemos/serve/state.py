"""What the routes of an application share."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from mnemos.serve.catalogue import Catalogue, Served
from mnemos.serve.collected import Metrics
from mnemos.serve.connection import Connection
from mnemos.serve.openai.response_store import ResponseStore
from mnemos.serve.settings import Settings


@dataclass(frozen=True)
class State:
    """Stored as `app.state.server`."""

    catalogue: Catalogue
    settings: Settings
    responses: ResponseStore
    metrics: Metrics

    async def hold(self, name: str | None, connection: Connection) -> Served:
        """The model of this name, which stays loaded until the connection's request has been answered."""
        return await connection.stack.enter_async_context(self.catalogue.use(name))


def server_of(request: Request) -> State:
    """The application's shared state, for handlers."""
    found: State = request.app.state.server
    return found
