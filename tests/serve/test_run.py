"""The socket that the server listens at."""

from __future__ import annotations

import asyncio
import socket

from mnemos.serve.run import listen
from mnemos.serve.settings import Settings


def test_a_token_does_not_wait_for_the_acknowledgement_of_the_one_before_it() -> None:
    async def option() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected = writer.get_extra_info("socket")
            found.set_result(connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen(Settings(port=0))
        async with await asyncio.start_server(accepted, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            await asyncio.wait_for(found, 5)
            writer.close()
        return found.result()

    assert asyncio.run(option()) != 0
