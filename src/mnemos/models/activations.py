"""The names of activation functions in model files."""

from __future__ import annotations

from mnemos.models.fields import Fields

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_activation(fields: Fields, name: str, default: str) -> str:
    """The operator's name for the activation in field `name`; GGUF leaves it to the architecture."""
    return fields.choice(name, ACTIVATION_NAMES, default)
