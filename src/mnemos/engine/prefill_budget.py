"""How much of a prompt a step may contain without stalling the streams that decode alongside it."""

from __future__ import annotations

STALL = 2.0  # how many times as long a step with a chunk may take: inter-token latency stays below 3 x its median
SMALLEST_CHUNK = 8
CROWD = 4
FORGETTING = 0.98  # what a step counts after another one


class PrefillBudget:
    """Learns, from the steps run so far, how many seconds a step takes: a constant and so much for each of its rows.

    A row of a prompt costs what a decoding row does, since both are multiplied with the same weights. The line is the
    weighted least squares fit, whose relative errors count, so that steps of one row and of hundreds are worth the
    same. The chunk size affects when tokens come, never which ones: logits do not depend on how a prompt was cut.
    """

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        # Weighted means and central moments of the steps' rows and seconds.
        self._weight = self._rows = self._seconds = 0.0
        self._rows_rows = self._rows_seconds = 0.0

    def chunk(self, decode_rows: int, prompts: int = 1) -> int:
        """The most prompt tokens for a step that also decodes `decode_rows` rows, while `prompts` prompts are unread.

        Decoding loses the same time to a prompt read at once as to one read in pieces; pieces only make for an even
        pace. Where many requests wait for their first token, that is not worth their wait: from the second one for
        every CROWD decoding rows on, the allowed stall grows with their number.
        """
        room = max(self.batch_tokens - decode_rows, SMALLEST_CHUNK)
        if not decode_rows or self._rows_seconds <= 0:
            return room
        per_row = self._rows_seconds / self._rows_rows
        decode_step = self._seconds + per_row * (decode_rows - self._rows)
        stall = (STALL - 1) * max(1.0, CROWD * (prompts - 1) / decode_rows) * decode_step
        return max(SMALLEST_CHUNK, min(room, int(stall / per_row)))

    def observe(self, decode_rows: int, prefill_rows: int, seconds: float) -> None:
        """Learns from a step."""
        rows = decode_rows + prefill_rows
        weight = 1 / rows**2
        self._weight = FORGETTING * self._weight + weight
        beyond = rows - self._rows
        self._rows += weight / self._weight * beyond
        self._seconds += weight / self._weight * (seconds - self._seconds)
        self._rows_rows = FORGETTING * self._rows_rows + weight * beyond * (rows - self._rows)
        self._rows_seconds = FORGETTING * self._rows_seconds + weight * beyond * (seconds - self._seconds)
