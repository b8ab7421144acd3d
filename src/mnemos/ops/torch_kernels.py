"""GPU kernels, written in Triton, for what takes PyTorch several: each reads its operands once and computes in float32.

Tillet et al. 2019, MAPL. Attention reads keys and values from their pages (Kwon et al. 2023, arXiv:2309.06180) block by
block, with the softmax carried along (Dao et al. 2022, arXiv:2205.14135); where each sequence has one new row, long
texts are cut into spans of a fixed length, computed side by side and joined (Dao et al. 2023, flash-decoding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemos.ops.protocol import AttentionParams
from mnemos.ops.torch_batch import TorchBatch

SPAN = 512  # positions that one program of a step of single rows reads
LOWEST = tl.constexpr(-1e30)  # in place of minus infinity, whose difference with itself is no number
GATES = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def _tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def _rms_norm(x, weight, out, epsilon, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(x + group * WIDTH + column, mask=inside, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / WIDTH + epsilon)
    result = values * scale * tl.load(weight + column, mask=inside, other=0)
    tl.store(out + group * WIDTH + column, result, mask=inside)


@triton.jit
def _gate(gate, up, out, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    if KIND == "silu":
        y = x / (1 + tl.exp(-x))
    elif KIND == "relu":
        y = tl.maximum(x, 0)
    elif KIND == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        y = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    tl.store(out + at, y * tl.load(up + at, mask=inside, other=0).to(tl.float32), mask=inside)


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    out,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = row * HEADS * DIM + head * DIM + column
    inside = (head < HEADS) & (column < HALF)
    c = tl.load(cos + row * 2 * HALF + column, mask=column < HALF, other=0)
    s = tl.load(sin + row * 2 * HALF + HALF + column, mask=column < HALF, other=0)
    first = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, first * c - second * s, mask=inside)
    tl.store(out + at + HALF, second * c + first * s, mask=inside)
    for start in range(2 * HALF, DIM, BLOCK):
        rest = (head < HEADS) & (start + column < DIM)
        tl.store(out + at + start, tl.load(x + at + start, mask=rest, other=0), mask=rest)


@triton.jit
def _store(k, v, keys, values, slots, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    target = tl.load(slots + row) * WIDTH + column
    tl.store(keys + target, tl.load(k + row * WIDTH + column, mask=inside, other=0), mask=inside)
    tl.store(values + target, tl.load(v + row * WIDTH + column, mask=inside, other=0), mask=inside)


@triton.jit
def _attend(
    q,
    keys,
    values,
    out,
    peaks,
    sums,
    starts,
    positions,
    pages,
    firsts,
    scale,
    softcap,
    width,
    spans,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of BLOCK_M rows: new rows of a sequence times the query heads of one key/value head.

    With SPLIT it reads one span; `out` is then float32, (rows, spans, heads, DIM), not yet divided by `sums`.
    """
    sequence = tl.program_id(0) // spans
    span = tl.program_id(0) % spans
    kv_head = tl.program_id(2)
    begin = tl.load(starts + sequence)
    end = tl.load(starts + sequence + 1)
    BLOCK_Q: tl.constexpr = BLOCK_M // BLOCK_GROUP
    first_row = begin + tl.program_id(1) * BLOCK_Q
    if first_row >= end:
        return
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    row = first_row + m // BLOCK_GROUP
    head = kv_head * GROUP + m % BLOCK_GROUP
    real = (row < end) & (m % BLOCK_GROUP < GROUP)
    position = tl.load(positions + row, mask=real, other=-1)
    at = (row.to(tl.int64) * (GROUP * KV_HEADS) + head)[:, None] * DIM + d[None, :]
    mask = real[:, None] & (d < DIM)[None, :]
    query = tl.load(q + at, mask=mask, other=0)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = sequence.to(tl.int64) * width
    # Pages ascend, so that no page after this one holds a position that a row sees, whatever gaps there are.
    last = tl.load(positions + tl.minimum(first_row + BLOCK_Q, end) - 1)
    count = tl.minimum(tl.maximum((last - tl.load(firsts + table)) // PAGE + 1, 0), width) * PAGE
    low = span * SPAN
    high = tl.minimum(count, low + SPAN) if SPLIT else count
    for start in range(low, high, BLOCK_N):
        index = start + n
        page = index // PAGE
        there = index < high
        held = tl.load(firsts + table + page, mask=there, other=2147483647)
        there = there & (held != 2147483647)
        held += index % PAGE
        slot = tl.load(pages + table + page, mask=there, other=0).to(tl.int64) * PAGE + index % PAGE
        source = (slot * KV_HEADS + kv_head)[:, None] * DIM + d[None, :]
        wanted = there[:, None] & (d < DIM)[None, :]
        k = tl.load(keys + source, mask=wanted, other=0).to(query.dtype)
        v = tl.load(values + source, mask=wanted, other=0).to(query.dtype)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * _tanh(scores / softcap)
        visible = there[None, :] & (held[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (position[:, None] - held[None, :] < WINDOW)
        scores = tl.where(visible, scores, LOWEST)
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.where(visible, tl.exp(scores - higher[:, None]), 0)
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = higher
    if SPLIT:
        place = (row.to(tl.int64) * spans + span) * (GROUP * KV_HEADS) + head
        tl.store(peaks + place, peak, mask=real)
        tl.store(sums + place, total, mask=real)
        tl.store(out + place[:, None] * DIM + d[None, :], mixed, mask=mask)
    else:
        tl.store(out + at, mixed / tl.where(total > 0, total, 1)[:, None], mask=mask)


@triton.jit
def _join(
    parts,
    peaks,
    sums,
    out,
    positions,
    firsts,
    width,
    most,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The spans of one row, of one sequence, and head, added up by their weights."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    count = (tl.load(positions + row) - tl.load(firsts + row * width)) // PAGE + 1
    spans = tl.minimum((tl.maximum(count, 1) * PAGE - 1) // SPAN + 1, most)
    peak = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([BLOCK_D], tl.float32)
    for span in range(spans):
        place = (row * most + span) * HEADS + head
        own = tl.load(peaks + place)
        higher = tl.maximum(peak, own)
        shrink, share = tl.exp(peak - higher), tl.exp(own - higher)
        total = total * shrink + tl.load(sums + place) * share
        mixed = mixed * shrink + tl.load(parts + place * DIM + d, mask=d < DIM, other=0) * share
        peak = higher
    tl.store(out + (row * HEADS + head) * DIM + d, mixed / tl.where(total > 0, total, 1), mask=d < DIM)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `Ops.rms_norm`; weight in float32."""
    x, width = x.contiguous(), len(weight)
    out = torch.empty_like(x)
    if x.numel():
        block = triton.next_power_of_2(width)
        warps = 4 if block <= 2048 else 8
        _rms_norm[(x.numel() // width,)](x, weight, out, epsilon, WIDTH=width, BLOCK=block, num_warps=warps)
    return out


def gate(x: Tensor, up: Tensor, kind: str) -> Tensor:
    """activation(x) * up; kind: one of GATES."""
    x, up = x.contiguous(), up.contiguous()
    out, block = torch.empty_like(x), 1024
    if x.numel():
        _gate[(triton.cdiv(x.numel(), block),)](x, up, out, x.numel(), KIND=kind, BLOCK=block)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """Rotates x (rows, heads * head_dim) by cos and sin (rows, 1, rotary_dim), float32; see `TorchOps.rope`."""
    x = x.contiguous()
    out, rows, heads, half = torch.empty_like(x), len(x), x.shape[1] // head_dim, cos.shape[-1] // 2
    block = triton.next_power_of_2(half)
    block_heads = max(1, min(triton.next_power_of_2(heads), 2048 // block))
    if rows:
        grid = rows, triton.cdiv(heads, block_heads)
        _rotate[grid](x, cos, sin, out, HEADS=heads, DIM=head_dim, HALF=half, BLOCK_HEADS=block_heads, BLOCK=block)
    return out


def store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Writes k and v (rows, width) to keys and values, flat over pages, at `slots` (rows,)."""
    rows, width = k.shape
    block = min(triton.next_power_of_2(width), 1024)
    if rows:
        grid = rows, triton.cdiv(width, block)
        _store[grid](k.contiguous(), v.contiguous(), keys, values, slots, WIDTH=width, BLOCK=block)


def attend(q: Tensor, keys: Tensor, values: Tensor, batch: TorchBatch, group: int, params: AttentionParams) -> Tensor:
    """The attention of a batch's rows, q (rows, heads * head_dim), to keys and values (pages, ...) of one layer."""
    q, out = q.contiguous(), torch.empty_like(q)
    tables, page, dim, heads = batch.tables[group], batch.page_size, params.head_dim, params.heads
    sequences, width = tables.pages.shape
    if not len(q):
        return out
    members = heads // params.kv_heads
    block_group, block_d = triton.next_power_of_2(members), max(16, triton.next_power_of_2(dim))
    wide = q.dtype == torch.float32 or block_d > 128
    single = batch.longest == 1
    block_m = max(16 if single else 32 if wide else 64, block_group)
    block_n = 32 if wide else 64
    spans = triton.cdiv(width * page, SPAN) if single else 1
    shape = len(q), spans, heads
    parts, peaks, sums = out, q, q  # the last two are used for spans alone
    if spans > 1:
        parts = torch.empty((*shape, dim), dtype=torch.float32, device=q.device)
        peaks, sums = torch.empty((2, *shape), dtype=torch.float32, device=q.device)
    grid = sequences * spans, triton.cdiv(batch.longest, block_m // block_group), params.kv_heads
    _attend[grid](
        q, keys, values, parts, peaks, sums, batch.starts, batch.positions, tables.pages, tables.firsts,
        params.scale, params.softcap, width, spans, GROUP=members, KV_HEADS=params.kv_heads, DIM=dim, PAGE=page,
        WINDOW=params.window or 0, SOFTCAP=bool(params.softcap), SPLIT=spans > 1, SPAN=SPAN, BLOCK_GROUP=block_group,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_stages=1 if wide else 2,
    )  # fmt: skip
    if spans > 1:
        _join[(len(q), heads)](
            parts, peaks, sums, out, batch.positions, tables.firsts, width, spans, HEADS=heads, DIM=dim, PAGE=page,
            SPAN=SPAN, BLOCK_D=block_d, num_warps=1,
        )  # fmt: skip
    return out
