"""`/v1/sessions`: the conversations that a tenant's requests continue by the field `session`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from mnemos.errors import FormatError
from mnemos.serve.connection import connection_of
from mnemos.serve.generation import sessions_of, unusable
from mnemos.serve.refusal import Refusal
from mnemos.serve.state import server_of

router = APIRouter(tags=["server"])


@router.get("/v1/sessions")
async def show(request: Request, model: str | None = None) -> dict[str, Any]:
    """The caller's sessions, the most recently used first."""
    state, connection = server_of(request), connection_of(request)
    served = await state.hold(model, connection)
    found = await served.in_thread(sessions_of, served, connection)
    data = [
        {
            "id": one.name,
            "object": "session",
            "model": one.model,
            "turns": one.turns,
            "tokens": one.tokens,
            "bytes": one.bytes,
            "last_used": int(one.modified),
        }
        for one in found
    ]
    return {"object": "list", "data": data}


@router.delete("/v1/sessions/{name}")
async def forget(name: str, request: Request, model: str | None = None) -> dict[str, Any]:
    """Deletes a session of the caller's."""
    state, connection = server_of(request), connection_of(request)
    served = await state.hold(model, connection)

    def delete() -> None:
        try:
            served.engine.forget_session(name, tenant=connection.caller.tenant)
        except FormatError as error:
            if "there is no session" in str(error):
                raise Refusal(404, f"there is no session {name[:80]!r}", param="name", code="not_found") from error
            raise unusable(error) from error

    await served.in_thread(delete)
    return {"id": name, "object": "session", "deleted": True}
