"""What a foreign module can do, found once by trying it on a few tokens."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.errors import ModelError
from mnemos.models.foreign.cache_styles import (
    AttentionStyle,
    Axes,
    CacheStyle,
    HuggingFaceStyle,
    KVCacheStyle,
    NestedStyle,
    Snapshot,
    find_axes,
    side_by_side,
)  # fmt: skip
from mnemos.models.foreign.call import Answer, Caller, advance, describe
from mnemos.models.foreign.growing_cache import Buffer, make_room
from mnemos.models.foreign.position_tables import PositionTables, common_positions

PROBE_LENGTH = 6


@dataclass(frozen=True)
class Abilities:
    """What a module was found to be able to do.

    vocabulary        the size of a row of logits
    hidden_size       of what the output projection reads; 0: there is none to be seen
    last_only         it answers for the last position only
    style, axes       how its cache is handled (None: it is run again over all tokens)
    chunks            it continues a cache with several tokens at once
    gaps              it heeds a mask, so that caches of different lengths can share a call
    grows             it takes cache tensors that have room to grow, and appends to them
    table_positions   the most positions that its tables have (None: it has no such tables)
    """

    vocabulary: int
    hidden_size: int
    last_only: bool
    style: CacheStyle | None
    axes: list[Axes]
    chunks: bool
    gaps: bool
    grows: bool
    table_positions: int | None = None


class Probe:
    """Tries token ids that every embedding of the module has, whichever of them is the vocabulary's."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        sizes = [m.num_embeddings for m in caller.module.modules() if isinstance(m, nn.Embedding)]
        self.size = min(sizes, default=2)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, self.size, (2, PROBE_LENGTH), generator=generator).to(caller.device)

    def run(self, use_kv_cache: bool) -> Abilities:
        caller = self.caller
        answer, seen = self._watched(PROBE_LENGTH)
        logits = self._check_shape(answer)
        last_only = logits.shape[1] == 1
        self.tolerance = 8e-2 * _size(logits) if _is_quantized(caller.module) else tolerance(logits)
        shorter, seen_shorter = self._watched(PROBE_LENGTH - 1)
        if not last_only:
            self._check_causal(logits, shorter.logits)
        self._find_head(logits)
        hidden = 0 if caller.head is None else int(self._hidden_size())
        style: CacheStyle | None = None
        axes: list[Axes] = []
        chunks = gaps = grows = False
        if use_kv_cache:
            style, axes = self._find_style()
            if style is not None:
                chunks = self._agrees(style, (3, 3))
                gaps = not last_only and self._gaps_agree(style, axes)
                grows = self._grows(style, axes)
        table_positions = common_positions(seen, seen_shorter)
        return Abilities(logits.shape[2], hidden, last_only, style, axes, chunks, gaps, grows, table_positions)

    def _watched(self, length: int) -> tuple[Answer, PositionTables]:
        """A call over the first `length` ids, and what it showed of the module's tables of positions."""
        with PositionTables(self.caller.module, length) as tables:
            return self.caller(self.ids[:1, :length], positions=self._positions(0, length)), tables

    def _positions(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.caller.device)[None, :]

    def _check_shape(self, answer: Answer) -> Tensor:
        logits = answer.logits
        if logits.shape[0] != 1 or logits.shape[1] not in (1, PROBE_LENGTH):
            raise ModelError(
                f"{describe(self.caller.module)} returned logits of shape {tuple(logits.shape)} for ids of shape "
                f"(1, {PROBE_LENGTH}); expected (1, {PROBE_LENGTH}, vocabulary)"
            )
        if not torch.isfinite(logits).all():
            raise ModelError(
                f"{describe(self.caller.module)} returned logits that are not finite for ids {self.ids[0].tolist()}"
            )
        return logits

    def _check_causal(self, logits: Tensor, shorter: Tensor) -> None:
        """`shorter`: the logits of the ids without the last one, which no earlier logits may depend on."""
        name, last = describe(self.caller.module), PROBE_LENGTH - 1
        if shorter.shape != (1, last, logits.shape[2]):
            raise ModelError(
                f"{name} returned logits of shape {tuple(shorter.shape)} for ids of shape (1, {last}); expected "
                f"(1, {last}, {logits.shape[2]})"
            )
        difference = (shorter - logits[:, :-1]).abs().max().item()
        if difference <= self.tolerance:
            return
        again = self.caller(self.ids[:1], positions=self._positions(0, PROBE_LENGTH)).logits
        if again.shape == logits.shape and (again - logits).abs().max().item() > self.tolerance:
            raise ModelError(
                f"{name} returns other logits for the same ids when it is called again, by up to "
                f"{(again - logits).abs().max().item():.3g}; expected the same in evaluation mode (does dropout ignore "
                "self.training, or is something real from call to call?)"
            )
        raise ModelError(
            f"{name} is not causal: without token {last}, the logits of earlier tokens differ by up to "
            f"{difference:.3g}; expected no difference (is a causal mask missing?)"
        )

    def _find_head(self, logits: Tensor) -> None:
        """The linear layer whose output the logits are; contrastive search needs what it reads."""
        seen: list[tuple[nn.Module, Tensor]] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen.append((module, output))

        linears = [
            m for m in self.caller.module.modules() if isinstance(m, nn.Linear) and m.out_features == logits.shape[2]
        ]
        handles = [linear.register_forward_hook(keep) for linear in linears]
        try:
            answer = self.caller(self.ids[:1], positions=self._positions(0, PROBE_LENGTH))
        finally:
            for handle in handles:
                handle.remove()
        for module, output in reversed(seen):
            if output.shape == answer.logits.shape and torch.equal(output, answer.logits.to(output.dtype)):
                self.caller.watch(module)
                return

    def _hidden_size(self) -> int:
        self.caller(self.ids[:1], positions=self._positions(0, PROBE_LENGTH))
        assert self.caller.hidden is not None
        return self.caller.hidden.shape[-1]

    def _find_style(self) -> tuple[CacheStyle | None, list[Axes]]:
        reason: BaseException | None = None
        for style in self._candidates():
            try:
                axes = self._axes(style)
                agrees = axes is not None and self._agrees(style, (3, 1, 1, 1))
            except ModelError as error:
                reason = error.__cause__ or error
                continue
            if axes is not None and agrees:
                return style, axes
        if reason is not None:
            warnings.warn(f"the cache of {describe(self.caller.module)} is not used: {reason}", stacklevel=5)
        return None, []

    def _candidates(self) -> list[CacheStyle]:
        caller = self.caller
        style = AttentionStyle(caller.module)
        if style.layers:
            return [style]
        if caller.signature.past is None:
            return []
        if hasattr(caller.inner, "generation_config"):
            return [HuggingFaceStyle()]
        try:
            returned = caller(self.ids[:1, :3], use_cache=True, positions=self._positions(0, 3)).past
        except ModelError:
            returned = None
        if returned is not None:
            return [HuggingFaceStyle() if hasattr(returned, "get_seq_length") else NestedStyle(returned, 3)]
        # It wants a cache to be given, as a first one.
        hugging_face: list[CacheStyle] = [HuggingFaceStyle()] if caller.signature.past == "past_key_values" else []
        return [*hugging_face, KVCacheStyle()]

    def step(self, style: CacheStyle, ids: Tensor, past: Any, start: int) -> tuple[Tensor, Any]:
        """One call that continues `past`, which covers the positions before `start`."""
        return advance(
            self.caller, style, ids, past, self._positions(start, start + ids.shape[1]).expand(ids.shape), None
        )

    def _axes(self, style: CacheStyle) -> list[Axes] | None:
        leaves = []
        for rows, length in ((1, 3), (1, 4), (2, 3)):
            _, past = self.step(style, self.ids[:rows, :length], style.empty(), 0)
            leaves.append(style.leaves(past) if past is not None else [])
        return find_axes(*leaves) if leaves[0] and len({len(item) for item in leaves}) == 1 else None

    def _agrees(self, style: CacheStyle, pieces: tuple[int, ...]) -> bool:
        """Whether the cache, fed in `pieces` and rebuilt between, gives the logits of the whole, within rounding."""
        whole = self.caller(self.ids[:1], positions=self._positions(0, PROBE_LENGTH)).logits
        past, start, difference = style.empty(), 0, 0.0
        for piece in pieces:
            if start:
                past = style.build(style.leaves(past), start)
            logits, past = self.step(style, self.ids[:1, start : start + piece], past, start)
            start += piece
            if logits.shape[::2] != whole.shape[::2]:
                raise ModelError(
                    f"{describe(self.caller.module)} returned logits of shape {tuple(logits.shape)} with its cache; "
                    f"expected (1, {piece}, {whole.shape[2]})"
                )
            if logits.shape[1] == piece and whole.shape[1] == PROBE_LENGTH:
                difference = max(difference, (logits - whole[:, start - piece : start]).abs().max().item())
            elif start == PROBE_LENGTH:
                difference = max(difference, (logits[:, -1] - whole[:, -1]).abs().max().item())
        if difference > self.tolerance and all(piece == 1 for piece in pieces[1:]):
            warnings.warn(
                f"{describe(self.caller.module)}: logits with its cache differ from those without by up to "
                f"{difference:.3g} (allowed {self.tolerance:.3g}); it is not used, every step runs over all tokens",
                stacklevel=5,
            )
        return difference <= self.tolerance

    def _grows(self, style: CacheStyle, axes: list[Axes]) -> bool:
        """Whether two sequences get the same logits behind tensors with room to grow, and were written into it."""
        if any(hasattr(module, "_orig_mod") for module in self.caller.module.modules()):
            return False  # what is compiled knows tensors of its own kind only
        pasts = [self.step(style, self.ids[:, :3], style.empty(), 0)[1] for _ in range(2)]
        buffers: list[Buffer] = []
        for start in (3, 4):
            new = self.ids[:, start : start + 1]
            wanted, pasts[0] = self.step(style, new, pasts[0], start)
            leaves, buffers = make_room(style.leaves(pasts[1]), axes, buffers, 1, self.caller.native)
            try:
                got, pasts[1] = self.step(style, new, style.replace(pasts[1], leaves, start), start)
            except ModelError:  # such as a view over axes that are not adjacent in memory
                return False
            held = style.leaves(pasts[1])
            if (got - wanted).abs().max().item() > self.tolerance or len(held) != len(buffers):
                return False
            if not all(
                buffer.filled == start + 1 and buffer.holds(leaf) for buffer, leaf in zip(buffers, held, strict=True)
            ):
                return False
        return True

    def _gaps_agree(self, style: CacheStyle, axes: list[Axes]) -> bool:
        """Whether two sequences of different length can share a step, the gap between them masked."""
        heeds_mask = self.caller.signature.mask or isinstance(style, AttentionStyle)
        if not heeds_mask or self.caller.signature.offset:
            return False
        parts, alone = [], []
        for row, length in ((0, 4), (1, 2)):
            _, past = self.step(style, self.ids[row : row + 1, :length], style.empty(), 0)
            parts.append((Snapshot([leaf.clone() for leaf in style.leaves(past)], axes, None), 0, length))
            alone.append(self.step(style, self.ids[row : row + 1, length : length + 1], past, length)[0])
        leaves, real = side_by_side(parts)
        assert real is not None
        ids = torch.stack((self.ids[0, 4:5], self.ids[1, 2:3]))
        positions = torch.tensor([[4], [2]], device=self.caller.device)
        try:
            together, _ = advance(self.caller, style, ids, style.build(leaves, 4), positions, real)
        except ModelError:
            return False
        return (together - torch.cat(alone)).abs().max().item() <= self.tolerance


def tolerance(logits: Tensor) -> float:
    """How far two computations of the same logits may lie apart: rounding of their dtype, scaled by their size."""
    return {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 2e-2}.get(logits.dtype, 8e-2) * _size(logits)


def _size(logits: Tensor) -> float:
    return float(logits.float().abs().max())


def _is_quantized(module: nn.Module) -> bool:
    """Whether layers round their inputs by the range of all together, so that each depends a little on the others."""
    return any(type(m).__module__.startswith("torch.ao.nn.quantized.dynamic") for m in module.modules())
