"""Whether a model answers as it did when its package was made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mnemos.contract import FirstLogits, Floats, ModelSpec
from mnemos.errors import FormatError, ModelError
from mnemos.formats.first_logits import distance, prompt_for, record

# Of the logits' spread. Backends round differently: in bfloat16, or with inputs in 8 bits, by up to 0.04 of it. A wrong
# tensor, or a right one read wrongly, moves some logit by several tenths.
TOLERANCE = 0.1
Logits = Callable[[list[int]], Floats]  # as `InferenceEngine.logits`


def first_logits(logits: Logits, spec: ModelSpec) -> FirstLogits:
    """What a model answers now. ModelError: NaN or infinity."""
    prompt = prompt_for(spec.vocabulary_size)[: spec.context_length]
    row = logits(list(prompt))[-1]
    if not np.isfinite(row).all():
        raise ModelError(f"{spec.architecture}: the logits after tokens {list(prompt)} are not finite numbers")
    return record(prompt, row)


def check_first_logits(logits: Logits, spec: ModelSpec) -> None:
    """FormatError unless a model answers as `spec.first_logits` says."""
    expected = spec.first_logits
    if expected is None:
        return
    fits = max(*expected.prompt, *expected.tokens) < spec.vocabulary_size
    fits = fits and len(expected.prompt) <= spec.context_length
    found = distance(expected, logits(list(expected.prompt))[-1]) if fits else float("inf")
    if not found <= TOLERANCE:
        raise FormatError(
            f"the model's first logits differ from its package's fingerprint by {found:.2g} of their spread; "
            f"expected at most {TOLERANCE}: the weights are others, or are computed with differently"
        )
