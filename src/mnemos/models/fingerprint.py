"""What a saved cache is bound to: a hash that changes when a model's weights or its computation do."""

from __future__ import annotations

from hashlib import sha256

from mnemos.formats.checkpoint import Checkpoint

_COMPUTATION = "1"  # increased whenever an architecture's computation changes


def fingerprint_of(checkpoint: Checkpoint, config: object, computation: tuple[str, ...]) -> str:
    """A hash of the hyperparameters, the tensors and the computation.

    Each tensor contributes its name, type, shape and four short samples: training or quantizing again changes
    every tensor everywhere, and reading all of a large file would cost more than loading it.
    """
    digest = sha256(repr((_COMPUTATION, config, computation)).encode())
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        digest.update(repr((name, int(tensor.type), tensor.shape)).encode())
        step = max(len(tensor.data) // 4, 1)
        for start in range(0, len(tensor.data), step):
            digest.update(tensor.data[start : start + 64].tobytes())
    return digest.hexdigest()
