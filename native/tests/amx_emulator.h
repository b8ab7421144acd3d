// AMX on processors without it, for tests: an AMX instruction there raises SIGILL, whose handler does what Intel's
// Software Developer's Manual says that the instruction does, and continues after it. So the very code that ships is
// what runs. What the manual makes a fault (a shape that does not fit, tiles without a configuration) ends the program
// with a message.
#pragma once

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <immintrin.h>
#include <ucontext.h>
#include <unistd.h>

namespace amx_emulator {

struct Tile {
  uint8_t bytes[16][64];
};

struct State {
  bool configured = false;
  uint16_t row_bytes[8] = {};
  uint8_t rows[8] = {};
  Tile tiles[8] = {};
  int64_t releases = 0, products = 0, bfloat_products = 0;
};

inline State state;  // of the one thread that tests have

[[noreturn]] inline void fail(const char *what) {
  fprintf(stderr, "AMX: %s\n", what);
  _exit(3);
}

inline void require(bool holds, const char *what) {
  if (!holds) fail(what);
}

inline void configure(const uint8_t *memory) {
  require(memory[0] == 1, "a palette other than 1");
  require(memory[1] == 0, "a start row");
  for (int i = 2; i < 16; i++) require(memory[i] == 0, "reserved bytes of the configuration");
  for (int i = 0; i < 16; i++) {
    uint16_t row_bytes;
    memcpy(&row_bytes, memory + 16 + 2 * i, 2);
    const uint8_t rows = memory[48 + i];
    require(row_bytes <= 64 && rows <= 16, "a tile's shape beyond the palette's");
    require((row_bytes == 0) == (rows == 0), "a tile of rows without bytes or the other way round");
    require(i < 8 || rows == 0, "shapes of tiles that do not exist");
    if (i < 8) state.row_bytes[i] = row_bytes, state.rows[i] = rows;
  }
  memset(state.tiles, 0, sizeof state.tiles);
  state.configured = true;
}

inline void load(int tile, const uint8_t *memory, int64_t stride) {
  Tile loaded{};  // rows and bytes beyond the shape are zero
  for (int r = 0; r < state.rows[tile]; r++) memcpy(loaded.bytes[r], memory + r * stride, state.row_bytes[tile]);
  state.tiles[tile] = loaded;
}

inline void store(int tile, uint8_t *memory, int64_t stride) {
  for (int r = 0; r < state.rows[tile]; r++)
    memcpy(memory + r * stride, state.tiles[tile].bytes[r], state.row_bytes[tile]);
}

inline void require_product(int sums, int a, int b) {
  require(sums != a && sums != b && a != b, "a product of a tile with itself");
  require(state.rows[sums] == state.rows[a], "sums and first operand differ in rows");
  require(state.row_bytes[sums] == state.row_bytes[b], "sums and second operand differ in columns");
  require(state.row_bytes[a] % 4 == 0 && state.row_bytes[a] / 4 == state.rows[b], "the operands do not fit each other");
  require(state.row_bytes[b] % 4 == 0, "columns that are not whole numbers");
}

inline void dot(int sums, int a, int b) {
  require_product(sums, a, b);
  for (int m = 0; m < state.rows[sums]; m++)
    for (int n = 0; n < state.row_bytes[sums] / 4; n++) {
      int32_t sum;
      memcpy(&sum, state.tiles[sums].bytes[m] + 4 * n, 4);
      for (int k = 0; k < state.rows[b]; k++)
        for (int i = 0; i < 4; i++)
          sum += int32_t(int8_t(state.tiles[a].bytes[m][4 * k + i])) * int8_t(state.tiles[b].bytes[k][4 * n + i]);
      memcpy(state.tiles[sums].bytes[m] + 4 * n, &sum, 4);
    }
  memset(state.tiles[sums].bytes[state.rows[sums]], 0, size_t(64 * (16 - state.rows[sums])));
  state.products++;
}

// Rounds to the nearest, ties to even, and takes denormals for zero, in and out, whatever the program has set.
class BfloatArithmetic {
 public:
  BfloatArithmetic() : settings_(_mm_getcsr()) { _mm_setcsr(0x1f80 | 0x8000 | 0x0040); }
  ~BfloatArithmetic() { _mm_setcsr(settings_); }
  // a * b + c with one rounding. In assembly, so that it stays between the two settings.
  static float fused(float a, float b, float c) {
    __asm__ volatile("vfmadd231ss %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
    return c;
  }

 private:
  unsigned settings_;
};

inline float bfloat(const uint8_t *p) {
  const uint32_t bits = uint32_t(p[0]) << 16 | uint32_t(p[1]) << 24;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Even and odd products are summed apart, and their sum is added to the total at the end.
inline void dot_bfloats(int sums, int a, int b) {
  require_product(sums, a, b);
  const BfloatArithmetic arithmetic;
  for (int m = 0; m < state.rows[sums]; m++)
    for (int n = 0; n < state.row_bytes[sums] / 4; n++) {
      float total, parts[2] = {0, 0};
      memcpy(&total, state.tiles[sums].bytes[m] + 4 * n, 4);
      for (int k = 0; k < state.rows[b]; k++)
        for (int i = 0; i < 2; i++)
          parts[i] = arithmetic.fused(bfloat(state.tiles[a].bytes[m] + 4 * k + 2 * i),
                                      bfloat(state.tiles[b].bytes[k] + 4 * n + 2 * i), parts[i]);
      total = arithmetic.fused(1, total, arithmetic.fused(1, parts[0], parts[1]));
      memcpy(state.tiles[sums].bytes[m] + 4 * n, &total, 4);
    }
  for (int m = state.rows[sums]; m < 16; m++) memset(state.tiles[sums].bytes[m], 0, 64);
  state.bfloat_products++;
}

inline int64_t general(const ucontext_t *context, int number) {
  static constexpr int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[places[number]];
}

// A memory operand in its 64-bit forms, and the length of what encodes it.
struct Operand {
  int64_t base, index;  // the index is scaled
  int length;
};

inline Operand operand(const ucontext_t *context, const uint8_t *modrm, bool extend_index, bool extend_base) {
  const int mode = modrm[0] >> 6, low = modrm[0] & 7;
  Operand found{0, 0, 1};
  require(mode != 3, "a register where memory belongs");
  if (low == 4) {
    const int index = (modrm[1] >> 3 & 7) + 8 * extend_index, base = modrm[1] & 7;
    require(mode != 0 || base != 5, "an address without a base");
    if (index != 4) found.index = general(context, index) * (1 << (modrm[1] >> 6));
    found.base = general(context, base + 8 * extend_base);
    found.length = 2;
  } else if (mode == 0 && low == 5) {  // relative to the next instruction, which begins after these four bytes
    int32_t distance;
    memcpy(&distance, modrm + 1, 4);
    return {int64_t(modrm + 5) + distance, 0, 5};
  } else {
    found.base = general(context, low + 8 * extend_base);
  }
  if (mode == 1) {
    found.base += int8_t(modrm[found.length]);
    found.length += 1;
  } else if (mode == 2) {
    int32_t distance;
    memcpy(&distance, modrm + found.length, 4);
    found.base += distance;
    found.length += 4;
  }
  return found;
}

// Does the instruction at `code` and returns its length.
inline int64_t execute(const uint8_t *code, const ucontext_t *context) {
  // Three-byte VEX: C4, inverted R X B and the map 0F38 (2), then W, inverted vvvv, L and the prefix.
  require(code[0] == 0xc4 && (code[1] & 0x1f) == 2 && (code[2] & 0x84) == 0, "an instruction outside AMX");
  const bool extend_index = !(code[1] & 0x40), extend_base = !(code[1] & 0x20);
  const int prefix = code[2] & 3, second = ~code[2] >> 3 & 15, opcode = code[3];
  enum { none, p66, f3, f2 };
  const uint8_t *modrm = code + 4;
  const int tile = modrm[0] >> 3 & 7;
  if (opcode == 0x49 && prefix == none && modrm[0] == 0xc0) {  // tilerelease
    State released;
    released.releases = state.releases + 1;
    released.products = state.products, released.bfloat_products = state.bfloat_products;
    state = released;
    return 5;
  }
  if (opcode == 0x49 && prefix == none && tile == 0) {  // ldtilecfg
    const Operand at = operand(context, modrm, extend_index, extend_base);
    configure(reinterpret_cast<const uint8_t *>(at.base + at.index));
    return 4 + at.length;
  }
  require(state.configured, "a tile is used before ldtilecfg");
  require(state.rows[tile] > 0, "a tile without a shape is used");
  if (opcode == 0x49 && prefix == f2 && (modrm[0] & 0xc7) == 0xc0) {  // tilezero
    state.tiles[tile] = Tile{};
    return 5;
  }
  if (opcode == 0x4b && (prefix == f2 || prefix == f3)) {  // tileloadd, tilestored: the scaled index is the stride
    require((modrm[0] & 7) == 4, "tile loads and stores need an index");
    const Operand at = operand(context, modrm, extend_index, extend_base);
    auto *memory = reinterpret_cast<uint8_t *>(at.base);
    if (prefix == f2)
      load(tile, memory, at.index);
    else
      store(tile, memory, at.index);
    return 4 + at.length;
  }
  const bool integers = opcode == 0x5e && prefix == f2, bfloats = opcode == 0x5c && prefix == f3;
  if ((integers || bfloats) && modrm[0] >= 0xc0) {  // tdpbssd, tdpbf16ps: the second operand is in vvvv
    require(second < 8 && state.rows[modrm[0] & 7] > 0 && state.rows[second] > 0, "a tile without a shape is used");
    const auto multiply = integers ? dot : dot_bfloats;
    multiply(tile, modrm[0] & 7, second);
    return 5;
  }
  fail("an instruction that the emulator does not know");
}

inline void handle(int, siginfo_t *, void *context_pointer) {
  auto *context = static_cast<ucontext_t *>(context_pointer);
  auto &next = context->uc_mcontext.gregs[REG_RIP];
  next += execute(reinterpret_cast<const uint8_t *>(next), context);
}

inline void install() {
  struct sigaction action {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  if (sigaction(SIGILL, &action, nullptr) != 0) fail("no handler for SIGILL");
}

}  // namespace amx_emulator
