"""The native core. Arrays must be contiguous and have exactly the stated type; errors are those of mnemos.errors."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
Order = npt.NDArray[np.intp]

def isa(operators: str) -> str:
    """The level in use for a class of operators: "quantized" and "floats" are products, "attention" all others.

    UnsupportedError if MNEMOS_ISA names a level that this CPU does not have.
    """

def likely_isa(operators: str) -> str:
    """The level that is probably best for these operators on this CPU."""

def available_isas() -> list[str]:
    """The levels that this CPU can run, lowest first."""

def select_isa(levels: str) -> None:
    """Changes the levels for objects created from now on: one for all, or "attention=avx2,floats=amx".

    Operators that are not named go back to the level of MNEMOS_ISA, or else to the preferred one.
    """

def prefer_isas(levels: str) -> None:
    """The same for operators that neither `select_isa` nor MNEMOS_ISA specifies."""

def keeps_bfloats() -> bool:
    """Whether attention's level has bfloat16 dot products, so that keys and values are best kept in bfloat16."""

def trial_seconds(operators: str, isa: str) -> float:
    """The time one thread takes for a little typical work of these operators with a level's kernels."""

def usable_cores() -> int:
    """Cores in the affinity mask, limited by the cgroup's CPU quota."""

def available_memory() -> int:
    """Bytes that can still be allocated, within the cgroup's limit; -1 if unknown."""

class Pool:
    @property
    def threads(self) -> int: ...
    @property
    def contended(self) -> bool:
        """Whether other programs have kept taking cores away from its threads lately."""

def shared_pool(threads: int) -> Pool:
    """The pool of that size, shared within the process; 0: usable_cores(). ConfigError if there are fewer cores."""

def read_bandwidth(pool: Pool, bytes: int, repeats: int) -> float:
    """Bytes per second that the pool's threads together read in sequence from `bytes` bytes; the best repeat."""

def multiply_rate(pool: Pool, isa: str, form: str, repeats: int) -> float:
    """The most multiply-adds per second that the pool's threads together reach in products with inputs of this form.

    isa: one of available_isas(). form: see Matrix.form. UnsupportedError if these kernels have no such products.
    """

class Matrix:
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def bytes(self) -> int:
        """Memory of the repacked form."""
    @property
    def form(self) -> str:
        """The input form of its products: "float32", "bfloat16" or "int8" (in blocks with scales)."""

def allocate_matrix(
    data: Bytes, type: int, rows: int, columns: int, as_float32: bool, order: Order | None, skip_zeros: bool = False
) -> Matrix:
    """A matrix without memory, which cannot be used before `pack_matrices` has packed it.

    order: the matrix has these of the `rows` rows, in this order. skip_zeros: blocks of 16 rows and 32 columns (64 in
    Q4_1 and Q5_1) that are zero take neither memory nor time, where an eighth of them or more is; the products have the
    same bits. Without effect on other types than F32, BF16, Q8_0, Q4_1 and Q5_1, and with an order or float32 kernels.
    """

def pack_matrices(matrices: list[tuple[Matrix, Bytes, Order | None, bool]], pool: Pool) -> None:
    """Repacks weights from `allocate_matrix`: (matrix, data, order, release) each, data and order as given to that.

    With `release`, the source's pages of the mapped file are released. The matrices share one piece of memory, which
    lives as long as any of them.
    """

def encode_rows(
    values: npt.NDArray[np.float32], type: int, importance: Floats | None, out: npt.NDArray[np.uint8], pool: Pool
) -> int:
    """Encodes (rows, columns) into `out`, (rows, bytes per row), in the storage type with that number.

    Returns the first row that the type cannot hold (not finite, or a scale beyond float16), or -1.
    """

def gather_rows(matrix: Matrix, ids: int, count: int, y: int) -> None:
    """Rows of a matrix by their numbers, as float32: addresses of `count` int64 and of (count, columns) float32.

    RequestError: there is no such row; some of the results are written then.
    """

def search_rows(
    values: npt.NDArray[np.float32],
    products: npt.NDArray[np.float32],
    factor: npt.NDArray[np.float32],
    format: tuple[int, ...],
    sweeps: int,
    codes: npt.NDArray[np.uint8],
    units: npt.NDArray[np.float32],
    integers: npt.NDArray[np.int8],
    pool: Pool,
) -> None:
    """Codes for (rows, columns) whose error costs error' products error; factor is the upper U of inverse(products) =
    U'U. `format` and the results are those of `mnemos.compress.search`."""

class Cache:
    """recall: window, recalled pages, sinks and the farthest distance, all in pages; for each layer and head
    whether it recalls; the components of keys that are indexed; for each layer and head which of its queries name
    pages, none for all; and whether what is `recalled` is measured."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: str,
        pages: int,
        recall: tuple[int, int, int, int, list[bool], list[int], list[list[int]], bool] | None = None,
    ) -> None: ...
    def begin_recall(self, recall: tuple[int, int, int, int, list[bool], list[int], list[list[int]], bool]) -> None: ...
    def recalled(self) -> Floats: ...
    @property
    def spilled(self) -> int: ...
    def spill_to(self, file: int) -> None: ...
    @property
    def pages(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def copy(self, source: int, target: int) -> None: ...
    def read(self, page: int) -> Bytes: ...
    def write(self, page: int, content: Bytes) -> None: ...
    def release(self, page: int) -> None:
        """Gives a page's memory back to the system; its content is lost."""

class Bank:
    """Keys and values of a memory bank, made when a chapter is first read.

    stored: the vectors' bytes, of `kind` float32, float16, bfloat16, int8 or int4, the last two with a scale for each;
    projections: (width, 2 * kv_heads * head_dim), keys' first. span: the rows of a chapter.
    """

    def __init__(
        self,
        stored: Bytes,
        kind: str,
        scales: Floats,
        projections: Floats,
        norm: str,
        epsilon: float,
        factor: float,
        rows: int,
        span: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: str,
    ) -> None: ...
    @property
    def bytes(self) -> int:
        """Memory of the keys and values made so far."""

class Windows:
    """The rows (width,) at a sequence's latest `length` positions, for some layers, in a slot for each sequence."""

    def __init__(self, layers: int, width: int, length: int) -> None: ...
    def reserve(self, slots: int) -> None: ...
    def copy(self, source: int, target: int) -> None: ...
    def clear(self, slot: int) -> None: ...

class LowRank:
    """What adapters add to a weight (rows, columns): for each, the bytes of a (rank, columns) and b (rows, rank) in
    float32 or float16 (type, as in GGUF), their rank and what b (a x) is multiplied by; or None."""

    def __init__(
        self, columns: int, rows: int, type: int, pairs: Sequence[tuple[Bytes, Bytes, int, float] | None]
    ) -> None: ...

class Program:
    """A forward pass that is recorded and then run. Values are numbers, in the order of recording."""

    def __init__(self, pool: Pool, caches: Sequence[Cache]) -> None: ...
    def input(self, width: int, integers: bool) -> int: ...
    def embed(self, matrix: Matrix, by_position: bool) -> int: ...
    def rows(self, x: int) -> int: ...
    def linear(self, x: int, matrix: Matrix, bias: Floats | None) -> int: ...
    def rms_norm(self, x: int, weight: Floats, epsilon: float) -> int: ...
    def layer_norm(self, x: int, weight: Floats, bias: Floats | None, epsilon: float) -> int: ...
    def rope(self, x: int, frequencies: Floats, head_dim: int, magnitude: float) -> int: ...
    def attention(
        self,
        q: int,
        k: int,
        v: int,
        group: int,
        layer: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> int: ...
    def activation(self, x: int, kind: str) -> int: ...
    def gated_activation(self, gate: int, up: int, kind: str) -> int: ...
    def add(self, x: int, y: int) -> int: ...
    def scale(self, x: int, factor: float) -> int: ...
    def softcap(self, x: int, cap: float) -> int: ...
    def route(self, x: int, router: Matrix, top_k: int, normalise: bool) -> tuple[int, int]: ...
    def choose(self, logits: int, top_k: int) -> tuple[int, int]: ...
    def pool(self, x: int, windows: Windows | None, layer: int, kind: str, window: int) -> int: ...
    def memory_attention(
        self,
        q: int,
        ids: int,
        weights: int,
        bank: Bank,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        rows: int,
        chapters: int,
        shared: int,
        scaling: float,
        separate: bool,
    ) -> int: ...
    def experts(
        self, x: int, ids: int, weights: int, gate: list[Matrix], up: list[Matrix], down: list[Matrix], kind: str
    ) -> int: ...
    def low_rank(self, y: int, x: int, factors: LowRank) -> int: ...
    def width(self, value: int) -> int: ...
    def finish(self, outputs: list[int]) -> None: ...
    def run(
        self,
        token_ids: Ints,
        positions: Ints,
        sequence_starts: Ints,
        pages: Ints,
        page_positions: Ints,
        page_starts: Ints,
        logit_rows: Ints,
        inputs: list[npt.NDArray[Any]],
        argmax: bool = False,
        states: Ints | None = None,
        threads: int = 0,
        adapters: Ints | None = None,
        sights: Ints | None = None,
    ) -> list[npt.NDArray[Any]]:
        """One step on a checked batch; the results are views that the next step overwrites.

        threads: the most to compute with, 0 for all of the pool's, which changes no result.
        argmax: instead of the last output, (rows, 1) int32 with the index of each row's largest value, the lowest on
        ties, or -1 if none is above minus infinity or one is not a number below infinity.
        """

    @property
    def finds_argmax(self) -> bool: ...
    def poison(self, on: bool) -> None:
        """Fills the workspace with NaN before each step, to find reads of unwritten memory."""

    def workspace_bytes(self, tokens: int, chosen: int) -> int:
        """Memory of a step with this many tokens and rows of logits, without partial results of long contexts."""

    @property
    def tasks(self) -> int: ...
    @property
    def barriers(self) -> int:
        """Barriers of all threads in a step of one token."""

class ForeignStep:
    """Operators of a pass that is run elsewhere, one call each. Addresses are those of values in memory, in float32
    or, for products with bfloat16 weights, bfloat16; quantized weights take and give float32.

    Between two products, the pool's other threads read ahead what the next one will need, as in the last pass.
    """

    def __init__(self, pool: Pool) -> None: ...
    def add(self, matrix: Matrix, bias: Floats | None, precise: bool = False) -> int:
        """A product x W^T + bias; its number. ConfigError if the weights are float16.

        precise: activations that quantized weights meet are rounded to 15 bits instead of 8.
        """

    def replace(self, number: int, matrix: Matrix, bias: Floats | None) -> None: ...
    def multiply(self, number: int, x: int, rows: int, y: int) -> None:
        """x (rows, columns), y (rows, the matrix's rows), both contiguous."""

    def attend(
        self,
        sizes: tuple[int, int, int, int, int],
        q: tuple[int, int, int],
        k: tuple[int, int, int],
        v: tuple[int, int, int],
        scale: float,
        y: int,
    ) -> None:
        """Attention of one query each; sizes: batch, heads, key/value heads, keys, width of a head.

        q, k, v: address, step from sequence to sequence and from head to head, in values; a head's keys are contiguous.
        y (batch, heads, width), contiguous.
        """

def copy_heads(batch: int, heads: int, width: int, source: tuple[int, int, int], target: tuple[int, int, int]) -> None:
    """Copies (batch, heads, width) values between memory given as in ForeignStep.attend."""

def rms_norm(x: int, weight: int, epsilon: float, y: int, rows: int, width: int) -> None:
    """y = x / rms(x) * weight for contiguous rows at these addresses."""

def uniform(seed: int, position: int, draw: int = 0) -> float:
    """53 random bits as a number in [0, 1): Philox4x32-10 with counter position | draw << 64."""

def sample(logits: Floats, temperature: Floats, top_k: Ints, top_p: Doubles, min_p: Doubles, random: Doubles) -> Ints:
    """A token for each row of logits (rows, vocabulary): temperature, top_k, top_p, min_p, then the token at `random`
    in the cumulative distribution in descending probability, ties by ascending id."""

def greedy(logits: Floats) -> Ints:
    """The lowest id of the largest logit, for each row."""

def log_sum_exp(logits: Floats) -> Doubles: ...
def top_tokens(logits: Floats, count: int) -> Ints:
    """The most probable tokens of one row, descending, ties by ascending id."""

class Pieces:
    """A vocabulary's texts, numbered from 0; empty ones stand for unused numbers. FormatError for a text that is there
    twice or is not UTF-8."""

    def __init__(self, texts: Sequence[str]) -> None: ...
    @staticmethod
    def of_strings(buffer: Bytes, count: int) -> Pieces:
        """Of strings as GGUF stores them: each after its 64-bit length."""

    def __len__(self) -> int: ...
    def text(self, number: int) -> str: ...
    def find(self, text: str) -> int:
        """The number of a text; -1 if it is none of them."""

    def empty_numbers(self) -> list[int]: ...

class TextModel:
    """How a word becomes tokens."""

# unknown (-1: none), fuse_unknown, byte_fallback, ignore_merges, prefix of all characters but the first, last suffix
BpeOptions: TypeAlias = tuple[int, bool, bool, bool, str, str]

def bpe(pieces: Pieces, merges: Sequence[str], options: BpeOptions) -> TextModel:
    """Merges of two tokens with a space between, the first one first. FormatError if one does not fit the pieces."""

def bpe_of_strings(pieces: Pieces, merges: Bytes, count: int, options: BpeOptions) -> TextModel:
    """The same, with merges as GGUF stores them."""

def scored_bpe(pieces: Pieces, order: Ints, options: BpeOptions) -> TextModel:
    """Two neighbours merge where they form a piece; order: each piece's rank, -1 for those that take no part."""

def unigram(pieces: Pieces, scores: Doubles, hidden: Sequence[int], unknown: int, byte_fallback: bool) -> TextModel:
    """The most probable pieces; `hidden` ones are never found, but count for the least score."""

def word_piece(pieces: Pieces, unknown: int, prefix: str, most_characters: int) -> TextModel: ...
def word_level(pieces: Pieces, unknown: int) -> TextModel: ...

# text, id, single_word, left, right, normalized, ignored
AddedToken: TypeAlias = tuple[str, int, bool, bool, bool, bool, bool]

class Encoder:
    """A tokenizer's way from text to ids. Steps are done in the order in which they were added; UnsupportedError for a
    step that is not known. Added tokens are set after all normalizers."""

    def __init__(self, model: TextModel) -> None: ...
    def normalize(self, kind: str) -> None: ...
    def normalize_bert(self, clean: bool, space_chinese: bool, strip_accents: bool, lowercase: bool) -> None: ...
    def prepend(self, text: str) -> None: ...
    def replace(self, pattern: str, literal: bool, content: str) -> None: ...
    def map_characters(self, table: bytes) -> None: ...
    def cut_at(self, pattern: str, literal: bool, use: str, inverted: bool) -> None: ...
    def cut_at_characters(self, kind: str, use: str) -> None: ...
    def cut_words(self) -> None: ...
    def cut_bytes(self, adds_space: bool, splits: bool) -> None: ...
    def cut_marks(self, mark: str, use: str, splits: bool) -> None: ...
    def set_added(self, tokens: Sequence[AddedToken], plain: Sequence[AddedToken]) -> None: ...
    def surround(self, before: Sequence[int], after: Sequence[int]) -> None: ...
    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Without the GIL. RequestError for a text that the model has no tokens for, or that takes too many steps."""

class TokenizerJson:
    """The large parts of a tokenizer.json. rest: the file with null for `model.vocab` and `model.merges`.

    count: tokens of the vocabulary. last: the highest id. scored: the vocabulary is a list of texts and scores.
    """

    def __init__(self, content: bytes) -> None: ...
    @property
    def rest(self) -> bytes: ...
    @property
    def count(self) -> int: ...
    @property
    def last(self) -> int: ...
    @property
    def scored(self) -> bool: ...
    def pieces(self) -> Pieces: ...
    def bpe(self, pieces: Pieces, options: BpeOptions) -> TextModel: ...
    def unigram(self, pieces: Pieces, unknown: int, byte_fallback: bool) -> TextModel: ...
