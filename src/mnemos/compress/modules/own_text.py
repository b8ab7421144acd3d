"""Token ids to calibrate with where nobody gives any: a module's own guesses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mnemos.compress.modules.batches import evaluating, logits_of
from mnemos.models.foreign.settings import find_context
from mnemos.models.foreign.signature import unwrap

ROUNDS = 8
ROWS, LENGTH = 32, 64


def own_text(model: nn.Module, seed: int = 0) -> Tensor | None:
    """Token ids (ROWS, at most LENGTH) that a language model finds likelier than others; None for other modules.

    Random ids at first; then, a few times, each is drawn anew from what the module says after those before it.
    """
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    if not sizes:
        return None
    generator = torch.Generator().manual_seed(seed)
    length = min(LENGTH, find_context(unwrap(model), None, None))
    try:
        with evaluating(model):
            logits = logits_of(model, torch.zeros(1, 1, dtype=torch.int64))
            # Positions have tables too, and logits may be padded: the table of tokens is the nearest in size.
            tokens = min(min(sizes, key=lambda size: abs(size - logits.shape[-1])), logits.shape[-1])
            ids = torch.randint(0, tokens, (ROWS, length), generator=generator, device="cpu")
            for _ in range(ROUNDS):
                logits = logits_of(model, ids)
                if logits.shape[:2] != ids.shape:
                    return None
                likely = logits[..., :tokens].float().cpu().softmax(-1).flatten(0, 1)
                drawn = torch.multinomial(likely, 1, generator=generator).view_as(ids)
                ids[:, 1:] = drawn[:, :-1]
    except Exception:  # not a module that takes token ids and nothing else
        return None
    return ids
