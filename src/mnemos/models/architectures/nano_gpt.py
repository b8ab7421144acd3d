"""nanoGPT's GPT: GPT-2 with the exact GELU, matrices as PyTorch's linear layers keep them, and biases if asked for."""

from __future__ import annotations

from typing import ClassVar

from mnemos.models.architectures.gpt2 import GPT2
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights


class NanoGPT(GPT2):
    """GPT-2's layers from a training checkpoint of nanoGPT."""

    transposed: ClassVar[bool] = False

    def __init__(self, fields: Fields, weights: Weights) -> None:
        own = {"n_positions": fields.size("block_size"), "activation_function": "gelu"}
        super().__init__(fields.with_defaults(own), weights)
