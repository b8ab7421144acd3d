"""Engines over the toy model."""

from tests.engine.conftest import engine

__all__ = ["engine"]
