"""What a foreign module's cache can do, found by trying the styles that people write."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mnemos.errors import ModelError
from mnemos.models.foreign.cache_styles import (
    HUGGING_FACE_NAMES,
    AttentionStyle,
    Axes,
    CacheStyle,
    GivenStyle,
    HuggingFaceStyle,
    KVCacheStyle,
    NestedStyle,
    Snapshot,
    find_axes,
    side_by_side,
)
from mnemos.models.foreign.call import Caller, advance
from mnemos.models.foreign.comparison import difference
from mnemos.models.foreign.conventions import empty_caches
from mnemos.models.foreign.growing_cache import Buffer, make_room
from mnemos.models.foreign.inner_cache import InnerStyle
from mnemos.models.foreign.inner_probe import find_inner
from mnemos.models.foreign.signature import describe
from mnemos.models.foreign.structures import Watch

PROBE_LENGTH = 6


@dataclass(frozen=True)
class CacheAbilities:
    """What a module was found to be able to do with its cache.

    style, axes   how the cache is handled, and where its tensors have batch and time
    batches       rows of one call do not influence each other
    chunks        it is continued with several tokens at once
    gaps          the module obeys a mask, so that caches of different lengths can share a call
    grows         it takes tensors that have room to grow, and appends to them
    aligned       without gaps, only sequences that are equally far can share a call
    """

    style: CacheStyle
    axes: list[Axes]
    batches: bool
    chunks: bool
    gaps: bool
    grows: bool
    aligned: bool

    @property
    def rewinds(self) -> bool:
        """Whether it can go back to any earlier position: it has keys and values, and no state of fixed size."""
        return all(axes.time is not None for axes in self.axes)


class CacheProbe:
    """Tries a module's cache on ids (2, PROBE_LENGTH), with `tolerance` between logits that should be the same."""

    def __init__(self, caller: Caller, ids: Tensor, tolerance: float) -> None:
        self.caller = caller
        self.ids = ids
        self.tolerance = tolerance
        self.batches = True

    def run(self, batches: bool, last_only: bool, context: int, plain: InnerStyle | None) -> CacheAbilities | None:
        """None: the module has no cache that can be used. For `batches` and `last_only` see `Abilities`.

        context: its positions; plain: the style of a cache that every call uses.
        """
        self.batches = batches
        style, axes = self._find_style(context, plain)
        if style is None:
            return None
        names, fixed = self.caller.signature, any(one.time is None for one in axes)
        keeps_positions = not all(one.time is None for one in axes)
        inner = isinstance(style, InnerStyle)
        counts = isinstance(style, (NestedStyle, InnerStyle)) and style.counts
        counts = counts or (isinstance(style, InnerStyle) and style.state.drive.cache_positions)
        batches = batches and self._rows_agree(style)
        return CacheAbilities(
            style,
            axes,
            batches,
            chunks=self._takes_chunks(style),
            gaps=batches and not (fixed or last_only or inner) and self._gaps_agree(style, axes),
            grows=batches and not (fixed or inner) and self._grows(style, axes),
            aligned=keeps_positions or counts or names.offset is not None or names.mask in names.required,
        )

    def _positions(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.caller.device)[None, :]

    def _find_style(self, context: int, plain: InnerStyle | None) -> tuple[CacheStyle | None, list[Axes]]:
        reason: BaseException | None = None
        if plain is None:
            with self.caller.lock:
                watch = Watch(self.caller.module)
                style, axes, reason = self._find_given_style()
                if style is not None:
                    return style, axes
                watch.undo()  # a call that fails may leave half of a state behind
        inner = plain or find_inner(self.caller, self.ids, context)
        if inner is not None and self._agrees(inner, (3, 1, 1, 1)):
            return inner, inner.axes
        self.caller(self.ids[:1], positions=self._positions(0, PROBE_LENGTH))  # makes what was undone that lasts
        if reason is not None:
            warnings.warn(f"the cache of {describe(self.caller.module)} is not used: {reason}", stacklevel=5)
        return None, []

    def _find_given_style(self) -> tuple[CacheStyle | None, list[Axes], BaseException | None]:
        """A cache that is handed over as an argument, or why none of the styles fits."""
        reason: BaseException | None = None
        named = self.caller.signature
        for name, style in self._candidates():
            self.caller.signature = replace(named, past=name)
            try:
                axes = self._axes(style)
                agrees = axes is not None and self._agrees(style, (3, 1, 1, 1), quiet=name != named.past)
            except ModelError as error:
                reason = reason or error.__cause__ or error if name == named.past else reason
                continue
            if axes is not None and agrees:
                return style, axes, None
        self.caller.signature = named
        return None, [], reason

    def _candidates(self) -> Iterator[tuple[str | None, CacheStyle]]:
        """Names of arguments, and the styles of caches that may be handed over under them."""
        caller, name = self.caller, self.caller.signature.past
        attention = AttentionStyle(caller.module)
        if attention.layers:
            yield name, attention
            return
        if name is None:
            returned = caller(self.ids[:1, :3], use_cache=True, positions=self._positions(0, 3)).past
            if returned is not None and not isinstance(returned, Tensor):
                for other in caller.signature.others:
                    yield other, NestedStyle(returned, 3)
            return
        for style in self._styles():
            yield name, style
        for make in empty_caches(caller.inner):
            given = make()
            try:
                caller(self.ids[:1, :3], past=given, use_cache=True, positions=self._positions(0, 3))
            except ModelError:
                continue
            yield name, GivenStyle(make, given, 3)

    def _styles(self) -> list[CacheStyle]:
        """The styles that a cache under one of the names that people write may have."""
        caller = self.caller
        if hasattr(caller.inner, "generation_config") and caller.signature.past in HUGGING_FACE_NAMES:
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
        short, longer = self._leaves(style, 1, 3), self._leaves(style, 1, 4)
        wider: list[Tensor] | None = None
        try:
            wider = self._leaves(style, 2, 3)
        except ModelError:
            if self.batches:
                raise
        alike = len(short) == len(longer) and (wider is None or len(wider) == len(short))
        return find_axes(short, longer, wider) if short and alike else None

    def _leaves(self, style: CacheStyle, rows: int, length: int) -> list[Tensor]:
        _, past = self.step(style, self.ids[:rows, :length], style.empty(), 0)
        return style.leaves(past) if past is not None else []

    def _agrees(self, style: CacheStyle, pieces: tuple[int, ...], quiet: bool = False) -> bool:
        """Whether the cache, fed in `pieces` and rebuilt between, gives the logits of the whole, within rounding."""
        whole = self.caller(self.ids[:1], positions=self._positions(0, PROBE_LENGTH)).logits
        past, start, apart = style.empty(), 0, 0.0
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
                apart = max(apart, difference(logits, whole[:, start - piece : start]))
            elif start == PROBE_LENGTH:
                apart = max(apart, difference(logits[:, -1], whole[:, -1]))
        if apart > self.tolerance and not quiet and all(piece == 1 for piece in pieces[1:]):
            warnings.warn(
                f"{describe(self.caller.module)}: logits with its cache differ from those without by up to "
                f"{apart:.3g} (allowed {self.tolerance:.3g}); it is not used, every step runs over all tokens",
                stacklevel=5,
            )
        return apart <= self.tolerance

    def _rows_agree(self, style: CacheStyle) -> bool:
        """Whether two rows that continue a cache get the logits of a call without one, whose rows are independent."""
        whole = self.caller(self.ids[:, :4], positions=self._positions(0, 4).expand(2, 4)).logits
        try:
            _, past = self.step(style, self.ids[:, :3], style.empty(), 0)
            logits, _ = self.step(style, self.ids[:, 3:4], style.build(style.leaves(past), 3), 3)
        except ModelError:
            return False
        return logits.shape[::2] == whole.shape[::2] and difference(logits[:, -1], whole[:, -1]) <= self.tolerance

    def _takes_chunks(self, style: CacheStyle) -> bool:
        try:
            return self._agrees(style, (3, 3))
        except ModelError:  # such as a recurrent module that makes one step at a time
            return False

    def _grows(self, style: CacheStyle, axes: list[Axes]) -> bool:
        """Whether two sequences get the same logits with tensors that have room to grow, and were written into it."""
        if any(hasattr(module, "_orig_mod") for module in self.caller.module.modules()):
            return False  # what is compiled knows tensors of its own kind only
        pasts = [self.step(style, self.ids[:, :3], style.empty(), 0)[1] for _ in range(2)]
        buffers: list[Buffer] = []
        times = [one.time for one in axes if one.time is not None]
        for start in (3, 4):
            new = self.ids[:, start : start + 1]
            wanted, pasts[0] = self.step(style, new, pasts[0], start)
            leaves, buffers = make_room(style.leaves(pasts[1]), times, buffers, 1, self.caller.native)
            try:
                got, pasts[1] = self.step(style, new, style.replace(pasts[1], leaves, start), start)
            except ModelError:  # such as a view over axes that are not adjacent in memory
                return False
            held = style.leaves(pasts[1])
            if difference(got, wanted) > self.tolerance or len(held) != len(buffers):
                return False
            if not all(
                buffer.filled == start + 1 and buffer.holds(leaf) for buffer, leaf in zip(buffers, held, strict=True)
            ):
                return False
        return True

    def _gaps_agree(self, style: CacheStyle, axes: list[Axes]) -> bool:
        """Whether two sequences of different length can share a step, the gap between them masked."""
        obeys_mask = self.caller.signature.mask or isinstance(style, AttentionStyle)
        if not obeys_mask or self.caller.signature.offset:
            return False
        parts, alone = [], []
        for row, length in ((0, 4), (1, 2)):
            _, past = self.step(style, self.ids[row : row + 1, :length], style.empty(), 0)
            parts.append((Snapshot([leaf.clone() for leaf in style.leaves(past)], axes, length), 0, length))
            alone.append(self.step(style, self.ids[row : row + 1, length : length + 1], past, length)[0])
        leaves, real = side_by_side(parts)
        assert real is not None
        ids = torch.stack((self.ids[0, 4:5], self.ids[1, 2:3]))
        positions = torch.tensor([[4], [2]], device=self.caller.device)
        try:
            together, _ = advance(self.caller, style, ids, style.build(leaves, 4), positions, real)
        except ModelError:
            return False
        return difference(together, torch.cat(alone)) <= self.tolerance
