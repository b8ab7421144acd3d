"""How much of a prompt a step may contain without stalling the streams that decode alongside it."""

from __future__ import annotations

STALL = 2.0  # how many times as long a step with a chunk may take: inter-token latency stays below 3 x its median
SMALLEST_CHUNK = 8
MEASURABLE = 8  # how many prompt tokens in a step are enough to learn from
SMOOTHING = 0.2


class PrefillBudget:
    """Learns, from the steps run so far, how many seconds a decoding step and a prompt token take.

    The chunk size affects when tokens come, never which ones: logits do not depend on how a prompt was cut.
    """

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self._prompt_token = 0.0
        self._decode_step = 0.0

    def chunk(self, decode_rows: int, prompts: int = 1) -> int:
        """The most prompt tokens for a step that also decodes `decode_rows` rows, while `prompts` prompts are unread.

        Where more requests wait for their first token than decode, holding them up costs more than it saves: the
        allowed stall grows with their number per decoding row.
        """
        room = max(self.batch_tokens - decode_rows, SMALLEST_CHUNK)
        if not decode_rows or not self._prompt_token or not self._decode_step:
            return room
        allowed = (STALL - 1) * max(1.0, prompts / decode_rows) * self._decode_step / self._prompt_token
        return max(SMALLEST_CHUNK, min(room, int(allowed)))

    def observe(self, decode_rows: int, prefill_rows: int, seconds: float) -> None:
        """Learns from a step."""
        if not prefill_rows:
            self._decode_step = _smooth(self._decode_step, seconds)
        elif prefill_rows >= MEASURABLE:
            rest = seconds - self._decode_step if decode_rows else seconds
            self._prompt_token = _smooth(self._prompt_token, max(rest, 0.0) / prefill_rows)


def _smooth(old: float, new: float) -> float:
    return new if not old else old + SMOOTHING * (new - old)
