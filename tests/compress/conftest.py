"""Fixtures shared by the tests of compression."""

from tests.models.conftest import backend, reference

__all__ = ["backend", "reference"]
