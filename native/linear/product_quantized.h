// Products with quantized weights and activations of one int8 part or two; see tiles.h. With two, a dot product is
// 128 * (that of the first parts) + (that of the second ones), exact in 32 bits: 32 * 255 * 128 * 127 is below 2^31.
#pragma once

#include "linear/tiles.h"

namespace mnemos {
namespace {

// Columns of a chunk of the quantized products: the codes of two panels, expanded to bytes, stay in the level-1 cache.
constexpr int chunk_blocks = 24;

// The needs of a block's arithmetic, for all storage types: one scale or one for each half, with minima or an offset.
template <const Layout &L>
constexpr int scale_vectors = (L.halves() ? 2 : 1) * (L.minimum() ? 2 : 1);

// If a bfloat16 dot product multiplies minima, they are stored, and added, for two blocks at a time.
template <class S, const Layout &L>
constexpr bool paired = S::bfloat_minima &&L.minimum() && !L.halves();

// The value subtracted from a code.
template <class S, const Layout &L>
constexpr int centre_of = paired<S, L> ? L.centre() : L.offset;

// Of these vectors, those that `add_block` takes.
template <class S, const Layout &L>
constexpr int block_vectors = paired<S, L> ? 1 : scale_vectors<L>;

struct Expanded {  // panels of one chunk, ready to multiply
  alignas(64) uint8_t codes[most_panels][chunk_blocks * 512];
  // Block after block; where paired: two blocks' scales, then their minima.
  alignas(64) float scales[most_panels][chunk_blocks * 4 * 16];
  bool ordinary = true;  // all scales have ordinary magnitudes
};

template <class S, const Layout &L>
constexpr int64_t scales_at(int64_t block) {
  return paired<S, L> ? (block / 2 * 4 + block % 2) * 16 : block * scale_vectors<L> * 16;
}
constexpr int64_t minima_at(int64_t block) { return (block / 2 * 4 + 2) * 16; }

template <class S, int Parts>
inline float scale_of(const QuantBlock<Parts> &x) {
  return S::adds_exponents ? x.scale() : x.terms[0];
}
// The sum of a block's activations.
template <class S, int Parts>
inline float sum_of(const QuantBlock<Parts> &x) {
  return S::bfloat_minima ? x.scale() * float(x.count()) : x.sum;
}

// Minima of two blocks, ready to be multiplied by the sums of the blocks' activations. One bfloat16 dot product does
// that for both, unless the activations have two parts: they are finer than its rounding.
template <class S, int Parts>
struct Minima {
  static constexpr bool bfloats = Parts == 1;
  typename S::Floats even, odd;  // as bfloat16 both are in the first

  static Minima of(typename S::Floats even, typename S::Floats odd) {
    if constexpr (bfloats)
      return {S::pair_bfloats(even, odd), S::zero()};
    else
      return {even, odd};
  }
  static Minima load(const float *p) {
    if constexpr (bfloats)
      return {S::load(p), S::zero()};
    else
      return {S::load(p), S::load(p + 16)};
  }
  void store(float *p) const {
    S::store(p, even);
    if constexpr (!bfloats) S::store(p + 16, odd);
  }
  // x: the even block and, unless that is a row's last one, the odd block.
  typename S::Floats add_to(typename S::Floats total, const QuantBlock<Parts> *x, bool both) const {
    if constexpr (bfloats)
      return S::dot_bfloats(total, S::as_bytes(even), S::broadcast_bfloats(x->sums));
    else
      total = S::fma(even, S::broadcast(sum_of<S>(x[0])), total);
    return both ? S::fma(odd, S::broadcast(sum_of<S>(x[1])), total) : total;
  }
};

// A block's codes are taken in turns: turn k takes the vectors k, k + turns, and so on, which are stored at the same
// places of the same bytes or of those that follow, but in other bits.
template <const Layout &L>
constexpr int turns = L.base == 2 || L.high == 2 ? 2 : 4;

// The bits above the base ones, of which a turn takes the lowest and every `turns`-th further one.
template <class S, const Layout &L>
struct HighBits {
  typename S::Bytes bits;

  explicit HighBits(const uint8_t *block) {
    if constexpr (L.high == 1) bits = S::load(block + L.base * 64);
  }
  void advance() {
    if constexpr (L.high == 1) bits = S::template shift<-1>(bits);
  }
};

// Vector v = turn + I * turns of a block (columns 4v..4v+3) as unsigned codes, a byte each.
template <class S, const Layout &L, int I>
inline MNEMOS_INLINE typename S::Bytes code_vector(const uint8_t *block, const HighBits<S, L> &high, int turn) {
  constexpr int first = I * turns<L>;
  typename S::Bytes code;
  if constexpr (L.base == 8) {
    code = S::load(block + (first + turn) * 64);
  } else if constexpr (L.base == 4) {
    code = S::template bits<-(first / 4 * 4), 15>(S::load(block + (first % 4 + turn) * 64));
  } else {
    code = S::template bits<-first, 3>(S::load(block + turn * 64));
  }
  if constexpr (L.high == 1) code = S::either(code, S::template bits<L.base - first, 1 << L.base>(high.bits));
  if constexpr (L.high == 2)
    code = S::either(code, S::template bits<L.base - first, 3 << L.base>(S::load(block + (L.base + turn) * 64)));
  if constexpr (L.table) code = S::lookup(code, iq4_values);
  return code;
}

// The scales of one block of a record: scale, or both halves' scales; then what is added for each unit of activation
// (to scale * (code - centre)).
template <class S, const Layout &L>
inline void load_scales(const uint8_t *record, int block, typename S::Floats *out) {
  const uint8_t *subscales = record + L.group * L.code_bytes(), *minima = subscales + L.subscales() * 16;
  const uint8_t *supers = L.minimum() ? minima + L.subscales() * 16 : minima;
  const typename S::Floats scale = S::load_halves(supers);
  if constexpr (L.subscales() == 0) {
    out[0] = scale;
    if constexpr (L.minimum()) out[1] = S::load_halves(supers + 32);
  } else {
    constexpr int parts = L.halves() ? 2 : 1;
    for (int i = 0; i < parts; i++) out[i] = S::multiply(scale, S::load_int8s(subscales + (block * parts + i) * 16));
    if constexpr (L.minimum()) {
      const typename S::Floats minimum = S::negate(S::load_halves(supers + 32));
      for (int i = 0; i < parts; i++)
        out[parts + i] = S::multiply(minimum, S::load_int8s(minima + (block * parts + i) * 16));
    }
  }
  if constexpr (paired<S, L>) out[1] = S::fma(out[0], S::broadcast(float(centre_of<S, L>)), out[1]);
}

// How a block's codes are stored when they are expanded: vector after vector. Other kernels arrange them differently.
template <class S>
struct InVectors {
  static void store(uint8_t *codes, const typename S::Bytes &vector) { S::store(codes, vector); }
  static void finish(uint8_t *) {}  // a block is complete
};

// Blocks first to first + count of a panel, expanded into bytes and float32 scales.
template <class S, const Layout &L, int Parts, class Arrangement = InVectors<S>>
void expand(const uint8_t *panel, int64_t first, int64_t count, int which, Expanded &weights) {
  const uint8_t *record = panel + first / L.group * L.record_bytes();
  uint8_t *codes = weights.codes[which];
  float *scales = weights.scales[which];
  typename S::Floats even = S::zero();
  int64_t at = 0;
  for (; at < count; record += L.record_bytes())
    for (int block = 0; block < L.group; block++, at++) {
      const uint8_t *source = record + block * L.code_bytes();
      HighBits<S, L> high(source);
#pragma GCC unroll 4
      for (int turn = 0; turn < turns<L>; turn++, high.advance())
        unroll<8 / turns<L>>([&](auto i) MNEMOS_INLINE {
          Arrangement::store(codes + at * 512 + (turn + i * turns<L>)*64, code_vector<S, L, i>(source, high, turn));
        });
      Arrangement::finish(codes + at * 512);
      typename S::Floats values[4];
      load_scales<S, L>(record, block, values);
      if constexpr (paired<S, L>) {
        S::store(scales + scales_at<S, L>(at), values[0]);
        if (at % 2 != 0) Minima<S, Parts>::of(even, values[1]).store(scales + minima_at(at));
        even = values[1];
      } else {
        for (int i = 0; i < scale_vectors<L>; i++) S::store(scales + scales_at<S, L>(at) + i * 16, values[i]);
      }
      if constexpr (S::adds_exponents && !L.halves()) weights.ordinary &= S::ordinary(values[0]);
    }
  if constexpr (paired<S, L>) {
    if (at % 2 != 0) Minima<S, Parts>::of(even, S::zero()).store(scales + minima_at(at));
  }
}

template <int Parts>
inline QuantBlock<Parts> *blocks_of(const Input &input, int64_t row) {
  return reinterpret_cast<QuantBlock<Parts> *>(input.blocks) + row * (input.padded / 32);
}

template <class S, const Layout &L>
constexpr int offset_of = S::signed_bytes &&L.bits() == 8 ? centre_of<S, L> - 128 : centre_of<S, L>;

// The initial values of a block's dot products (of its first and second half), so that they end without the codes'
// offset.
template <class S, const Layout &L, int Parts>
inline int32_t start_of(const QuantBlock<Parts> &x, int half) {
  constexpr int offset = offset_of<S, L>;
  if constexpr (offset == 0) return 0;
  if constexpr (L.halves()) return -offset * (half == 0 ? x.first_count : x.second_count());
  static_assert(offset % 8 == 0 || L.halves());
  return half == 0 ? x.start * (offset / 8) : 0;
}

// How many vectors of a block are multiplied at once.
template <class S, const Layout &L>
constexpr int step = S::template together<L.bits()>;

template <class S, const Layout &L, int N>
inline MNEMOS_INLINE typename S::Ints add_products(typename S::Ints sum, const typename S::Bytes (&codes)[N],
                                                   const typename S::Quad (&x)[N]) {
  if constexpr (N == 1)
    return S::template dot<L.bits()>(sum, codes[0], x[0]);
  else
    return S::template dot_two<L.bits()>(sum, codes, x);
}

// The dot products of a block's first parts are complete.
template <class S, const Layout &L>
inline typename S::Ints shifted(typename S::Ints dots) {
  return S::shift_part(S::template end<L.bits()>(dots, 0));
}

// Sums of codes this small are kept in 16 bits until the block ends, so the second parts cannot be added to the first
// ones' sums.
template <class S, const Layout &L>
constexpr bool apart = L.bits() <= S::narrow_bits;

// Adds one block to the totals. Every kernel ends a block here: this is the order of rounding that they share.
// Without halves `first` is the whole block's dot product and `second` is ignored. Paired minima follow after two
// blocks.
template <class S, const Layout &L, int Parts>
inline typename S::Floats add_block(typename S::Floats total, typename S::Ints first, typename S::Ints second,
                                    const typename S::Floats *scales, const QuantBlock<Parts> &x) {
  if constexpr (L.halves()) {
    typename S::Floats part = S::multiply(scales[0], S::to_floats(first));
    part = S::fma(scales[1], S::to_floats(second), part);
    total = S::fma(part, S::broadcast(scale_of<S>(x)), total);
    if constexpr (L.minimum()) {
      total = S::fma(scales[2], S::broadcast(scale_of<S>(x) * float(x.first_count)), total);
      total = S::fma(scales[3], S::broadcast(scale_of<S>(x) * float(x.second_count())), total);
    }
  } else {
    total = S::fma(S::multiply(scales[0], S::broadcast(scale_of<S>(x))), S::to_floats(first), total);
    if constexpr (L.minimum() && !paired<S, L>) total = S::fma(scales[1], S::broadcast(sum_of<S>(x)), total);
  }
  return total;
}

// Prefetches the packed weights after the current ones, a few lines with each block, so that memory and
// arithmetic overlap.
struct Prefetch {
  const uint8_t *next[most_panels];
  int64_t bytes, step, done;
  Ahead *afterwards;

  void advance(int panels) {
    for (const int64_t end = smaller(bytes, done + step); done < end; done += 64)
      for (int p = 0; p < panels; p++) __builtin_prefetch(next[p] + done, 0, 2);
    if (afterwards != nullptr) afterwards->advance();
  }
};

// P panels by R rows over the blocks of one chunk; Listed: the panels skip blocks. With `ByExponents`, scales are
// multiplied by integer additions, to the same bits; this returns false, and nothing is stored, if an activation is not
// finite, for which that doesn't hold.
template <class S, const Layout &L, int Parts, int P, int R, bool Listed, bool ByExponents>
MNEMOS_KERNEL bool tile(const Expanded &weights, const Input &input, int64_t row, Places places, int64_t blocks,
                        const Output &out, Prefetch &prefetch) {
  constexpr int halves = L.halves() ? 2 : 1, n = step<S, L>;
  typename S::Floats totals[R][P];
  unroll<R>([&](auto r) MNEMOS_INLINE {
    unroll<P>([&](auto p) MNEMOS_INLINE { totals[r][p] = S::load(out.starts[p] + r * out.start_stride[p]); });
  });
  const QuantBlock<Parts> *rows[R];
  for (int r = 0; r < R; r++) rows[r] = blocks_of<Parts>(input, row + r) + (Listed ? 0 : places.first);
  uint32_t signs = 0;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t place = Listed ? places[b] : b;
    prefetch.advance(P);
    // A few rows at a time: while the sums of some are scaled, the next ones' dot products begin.
    constexpr int most = smaller(R, S::rows_together);
    unroll<(R + most - 1) / most>([&](auto group) MNEMOS_INLINE {
      constexpr int begin = group * most, count = smaller(most, R - begin);
      const QuantBlock<Parts> *x[count];
      for (int r = 0; r < count; r++) x[r] = rows[begin + r] + place;
      typename S::Ints dots[2][count][P], high[2][count][P];
      unroll<Parts>([&](auto part) MNEMOS_INLINE {
        constexpr bool last = part == Parts - 1;
        auto half = [&](int h) MNEMOS_INLINE {
          for (int r = 0; r < count; r++) {
            const auto start = S::template begin<L.bits()>(last ? start_of<S, L>(*x[r], h) : 0);
            for (int p = 0; p < P; p++) {
              auto &dot = dots[L.halves() ? h : 0][r][p];
              if constexpr (part > 0) high[L.halves() ? h : 0][r][p] = shifted<S, L>(dot);
              dot = start;
              if constexpr (part > 0 && !apart<S, L>) dot = S::add_ints(start, high[L.halves() ? h : 0][r][p]);
            }
          }
        };
        unroll<halves>([&](auto h) MNEMOS_INLINE {
          half(h);
          for (int v = h * 4; v < (h + 1) * (8 / halves); v += n) {
            typename S::Bytes codes[P][n];
            for (int p = 0; p < P; p++)
              for (int i = 0; i < n; i++)
                codes[p][i] = S::in_register(S::load(weights.codes[p] + b * 512 + (v + i) * 64));
            for (int r = 0; r < count; r++) {
              typename S::Quad quads[n];
              for (int i = 0; i < n; i++) quads[i] = S::broadcast_quad(x[r]->parts[part] + (v + i) * 4);
              for (int p = 0; p < P; p++) dots[h][r][p] = add_products<S, L>(dots[h][r][p], codes[p], quads);
            }
          }
        });
      });
      unroll<P>([&](auto p) MNEMOS_INLINE {
        typename S::Floats scales[4];
        const float *source = weights.scales[p] + scales_at<S, L>(b);
        for (int i = 0; i < block_vectors<S, L>; i++) scales[i] = S::load(source + i * 16);
        unroll<count>([&](auto r) MNEMOS_INLINE {
          auto &total = totals[begin + r][p];
          typename S::Ints ends[2];
          for (int h = 0; h < halves; h++) {
            ends[h] = S::template end<L.bits()>(dots[h][r][p], start_of<S, L>(*x[r], h));
            if constexpr (Parts == 2 && apart<S, L>) ends[h] = S::add_ints(ends[h], high[h][r][p]);
          }
          if constexpr (ByExponents) {
            total = S::fma(S::multiply_powers(scales[0], x[r]->terms), S::to_floats(ends[0]), total);
          } else {
            total = add_block<S, L, Parts>(total, ends[0], ends[L.halves() ? 1 : 0], scales, *x[r]);
          }
        });
      });
      if constexpr (ByExponents) {
        for (int r = 0; r < count; r++) signs |= to_bits(x[r]->terms[0]);
      }
    });
    if constexpr (paired<S, L>) {
      if (b % 2 != 0 || b + 1 == blocks) {
        unroll<P>([&](auto p) MNEMOS_INLINE {
          const auto minima = Minima<S, Parts>::load(weights.scales[p] + minima_at(b));
          unroll<R>([&](auto r) MNEMOS_INLINE {
            totals[r][p] = minima.add_to(totals[r][p], rows[r] + place - b % 2, b % 2 != 0);
          });
        });
      }
    }
  }
  if (int32_t(signs) < 0) return false;
  unroll<R>([&](auto r) MNEMOS_INLINE {
    unroll<P>([&](auto p) MNEMOS_INLINE { S::store(out.rows[p] + r * out.stride[p], totals[r][p]); });
  });
  return true;
}

// One panel by R rows over all of its blocks, straight from the packed form: for few rows, where reading the weights is
// the work. Sums of a block's parts are kept apart, and for few rows those of its halves, so that the dot products need
// not wait for each other.
template <class S, const Layout &L, int Parts, int R, bool Listed>
MNEMOS_KERNEL void stream(const uint8_t *panel, Places places, int64_t blocks, const Input &input, int64_t row,
                          const Output &out) {
  constexpr int sums = L.halves() || (Parts == 1 && R <= S::split_rows) ? 2 : 1;
  typename S::Floats totals[R];
  for (int r = 0; r < R; r++) totals[r] = S::load(out.starts[0] + r * out.start_stride[0]);
  const QuantBlock<Parts> *rows[R];
  for (int r = 0; r < R; r++) rows[r] = blocks_of<Parts>(input, row + r);
  typename S::Floats even = S::zero();
  int64_t at = 0;
  for (int64_t done = 0; done < blocks; done += L.group, panel += L.record_bytes()) {
    for (int block = 0; block < L.group; block++, at++) {
      const int64_t place = Listed ? places[at] : at;
      const uint8_t *source = panel + block * L.code_bytes();
      constexpr int share = L.record_bytes() / L.group;  // a few lines with each block: many at once would have to wait
      for (int ahead = 0; ahead < share; ahead += 64)
        __builtin_prefetch(panel + prefetch_bytes + block * share + ahead);
      typename S::Ints dots[Parts][sums][R];
      int32_t starts[sums][R];
      for (int r = 0; r < R; r++)
        for (int h = 0; h < sums; h++) {
          starts[h][r] = start_of<S, L>(rows[r][place], h);
          dots[Parts - 1][h][r] = S::template begin<L.bits()>(starts[h][r]);
          if constexpr (Parts == 2) dots[0][h][r] = S::template begin<L.bits()>(0);
        }
      constexpr int n = step<S, L>, loops = L.halves() ? 2 : 1, groups = 8 / turns<L> / n / loops;
      unroll<loops>(
          [&](auto loop) MNEMOS_INLINE {  // the halves' sums of many rows would not all fit into the registers
            HighBits<S, L> high(source);
            for (int turn = 0; turn < turns<L>; turn++, high.advance())
              unroll<groups>([&](auto group) MNEMOS_INLINE {
                constexpr int first = (loop * groups + group) * n, h = first * turns<L> / 4 * (sums - 1);
                typename S::Bytes codes[n];
                unroll<n>([&](auto i) MNEMOS_INLINE { codes[i] = code_vector<S, L, first + i>(source, high, turn); });
                for (int r = 0; r < R; r++)
                  for (int part = 0; part < Parts; part++) {
                    typename S::Quad quads[n];
                    for (int i = 0; i < n; i++)
                      quads[i] = S::broadcast_quad(rows[r][place].parts[part] + ((first + i) * turns<L> + turn) * 4);
                    dots[part][h][r] = add_products<S, L>(dots[part][h][r], codes, quads);
                  }
              });
          });
      typename S::Floats scales[4];
      load_scales<S, L>(panel, block, scales);
      for (int r = 0; r < R; r++) {
        const QuantBlock<Parts> &x = rows[r][place];
        typename S::Ints ends[2];
        for (int h = 0; h < sums; h++) {
          ends[h] = S::template end<L.bits()>(dots[Parts - 1][h][r], starts[h][r]);
          if constexpr (Parts == 2) ends[h] = S::add_ints(ends[h], shifted<S, L>(dots[0][h][r]));
        }
        if constexpr (sums == 2 && !L.halves()) ends[0] = S::add_ints(ends[0], ends[1]);
        totals[r] = add_block<S, L, Parts>(totals[r], ends[0], ends[sums - 1], scales, x);
      }
      if constexpr (paired<S, L>) {
        const bool odd = at % 2 != 0;
        if (odd || at + 1 == blocks) {
          const auto minima = Minima<S, Parts>::of(odd ? even : scales[1], odd ? scales[1] : S::zero());
          for (int r = 0; r < R; r++) totals[r] = minima.add_to(totals[r], rows[r] + place - odd, odd);
        }
        even = scales[1];
      }
    }
  }
  for (int r = 0; r < R; r++) S::store(out.rows[0] + r * out.stride[0], totals[r]);
}

// Layouts that differ only in how they are stored share their tiles.
template <const Layout &L>
constexpr const Layout &same_arithmetic() {
  if constexpr (L.halves())
    return L;
  else if constexpr (L.minimum())
    return L.bits() == 4 ? layouts::q4_1 : layouts::q5_1;
  else
    return L.table ? layouts::q8_0 : L;
}

// Layouts whose codes are expanded without their offset differ only in their scales.
template <const Layout &L>
constexpr const Layout &same_scales() {
  if constexpr (L.halves())
    return L.minimum() ? layouts::q2_k : layouts::q3_k;
  else
    return L.minimum() ? layouts::q4_1 : layouts::q8_0;
}

// Expands P panels chunk by chunk, of even sizes, and calls body(integral_constant R, weights, row, places, blocks,
// output, prefetch) for tiles that cover the rows, of which there are at least `Fewest`, with at most `Most` each. Of
// the P panels only `panels` exist: the last one is multiplied again for each of the others. All store the same blocks.
template <class S, const Layout &L, int Parts, int P, int Fewest, int Most, class Arrangement, class Body>
void for_chunks(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel,
                int64_t panels, const Results &results, Body &&body) {
  Expanded weights;
  const int64_t blocks = matrix.stored_blocks(panel), chunks = (blocks + chunk_blocks - 1) / chunk_blocks;
  constexpr int64_t unit = L.group > 1 ? L.group : 2;  // blocks come in pairs
  const int64_t chunk = ((blocks + chunks - 1) / chunks + unit - 1) / unit * unit;
  const int64_t tiles = (row_end - row_begin + Most - 1) / Most;
  for (Places places{matrix.places(panel), 0}; places.first < blocks; places.first += chunk) {
    const int64_t first = places.first, count = smaller(chunk, blocks - first), end = first + count;
    Prefetch prefetch{{}, chunk / L.group * L.record_bytes(), 0, 0, input.ahead};
    prefetch.step = (prefetch.bytes / (tiles * count) + 63) / 64 * 64;
    weights.ordinary = true;
    for (int p = 0; p < P; p++) {
      const int64_t source = panel + smaller(p, panels - 1);
      expand<S, L, Parts, Arrangement>(matrix.panel(source), first, count, p, weights);
      prefetch.next[p] =
          end < blocks ? matrix.panel(source) + end / L.group * L.record_bytes() : matrix.panel(source + P);
    }
    for_tiles<P, Fewest, Most>(matrix, panel, panels, row_begin, row_end, results, first > 0,
                               [&](auto r, int64_t row, const Output &out) {
                                 if (input.ahead != nullptr) input.ahead->refill();
                                 body(r, weights, row, places, count, out, prefetch);
                               });
  }
}

// P panels, of which `panels` exist. Listed: they skip blocks, the same ones; a function of its own, as looking up
// where a block belongs takes time that single rows notice.
template <class S, const Layout &L, int Parts, int P, bool Listed>
void multiply_quantized(const Matrix &matrix, const Input &input, int64_t row_begin, int64_t row_end, int64_t panel,
                        int64_t panels, const Results &results) {
  if (row_end - row_begin <= S::stream_rows) {
    const Places places{matrix.places(panel), 0};
    for (int64_t p = panel; p < panel + panels; p++)
      for_tiles<1, 1, Parts == 1 ? S::stream_rows : S::fine_rows>(
          matrix, p, 1, row_begin, row_end, results, false, [&](auto r, int64_t row, const Output &out) {
            stream<S, L, Parts, r, Listed>(matrix.panel(p), places, matrix.stored_blocks(p), input, row, out);
          });
    return;
  }
  // Of a single panel there are more rows, so that as many sums are independent of each other.
  constexpr int most = P == S::tile_panels ? S::tile_rows : smaller(S::tile_panels * S::tile_rows, 8);
  for_chunks<S, L, Parts, P, S::stream_rows + 1, most, InVectors<S>>(
      matrix, input, row_begin, row_end, panel, panels, results,
      [&](auto r, const Expanded &weights, int64_t row, Places places, int64_t count, const Output &out,
          Prefetch &prefetch) {
        constexpr const Layout &layout = same_arithmetic<L>();
        if constexpr (S::adds_exponents && !L.halves()) {
          if (weights.ordinary &&
              tile<S, layout, Parts, P, r, Listed, true>(weights, input, row, places, count, out, prefetch))
            return;
        }
        tile<S, layout, Parts, P, r, Listed, false>(weights, input, row, places, count, out, prefetch);
      });
}

template <const Layout &L>
struct Quantized {
  static constexpr const Layout &layout = L;
};

// Calls body(Quantized<layout>) for a quantized type.
template <class Body>
void with_layout(WeightType type, Body &&body) {
  switch (type) {
    case WeightType::q4_0: return body(Quantized<layouts::q4_0>{});
    case WeightType::q4_1: return body(Quantized<layouts::q4_1>{});
    case WeightType::q5_0: return body(Quantized<layouts::q5_0>{});
    case WeightType::q5_1: return body(Quantized<layouts::q5_1>{});
    case WeightType::q8_0: return body(Quantized<layouts::q8_0>{});
    case WeightType::q2_k: return body(Quantized<layouts::q2_k>{});
    case WeightType::q3_k: return body(Quantized<layouts::q3_k>{});
    case WeightType::q4_k: return body(Quantized<layouts::q4_k>{});
    case WeightType::q5_k: return body(Quantized<layouts::q5_k>{});
    case WeightType::q6_k: return body(Quantized<layouts::q6_k>{});
    case WeightType::iq4_nl: return body(Quantized<layouts::iq4_nl>{});
    case WeightType::iq4_xs: return body(Quantized<layouts::iq4_xs>{});
    default: return;  // float layouts
  }
}

// Calls body(Quantized<layout>) for the quantized types that can skip blocks.
template <class Body>
void with_kept_layout(WeightType type, Body &&body) {
  if (type == WeightType::q4_1) return body(Quantized<layouts::q4_1>{});
  if (type == WeightType::q5_1) return body(Quantized<layouts::q5_1>{});
  if (type == WeightType::q8_0) return body(Quantized<layouts::q8_0>{});
}

}  // namespace
}  // namespace mnemos
