"""The real model behind a server, as in the server's own tests."""

from tests.serve.conftest import client, engine

__all__ = ["client", "engine"]
