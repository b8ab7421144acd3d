"""What can be embedded, and how tokens become one vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemos.errors import UnsupportedError
from mnemos.rules import one_of

if TYPE_CHECKING:
    from mnemos.contract import ModelSpec

POOLING = one_of("mean", "last")


def check_embedding(spec: ModelSpec, pooling: str) -> None:
    """UnsupportedError for a model that shows no hidden states, ConfigError for an unknown pooling."""
    POOLING.apply("pooling", pooling)
    if not spec.hidden_size:
        raise UnsupportedError(
            f"{spec.architecture} shows no hidden states, of which an embedding is made; a module needs an "
            "nn.Linear whose output its logits are"
        )
