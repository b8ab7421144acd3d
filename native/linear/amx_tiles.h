// The tile instructions of AMX that the products use. A thread has eight tiles of at most 16 rows of 64 bytes.
//
// They are written in assembly since the compilers' own forms of them take no tile number from a template argument.
// Each one may read or write memory, so the compiler keeps loads and stores in their order around them.
#pragma once

#include <cstdint>

namespace mnemos {
namespace {

// What ldtilecfg reads: the shape of each tile.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct AmxTiles {
  // All tiles become zero.
  static void configure(const TileShapes &shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }
  // Back to the state in which the operating system need not save the tiles.
  static void release() { __asm__ volatile("tilerelease" : : : "memory"); }
  template <int Tile>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(Tile) : "memory");
  }
  // Rows are `stride` bytes apart in memory.
  template <int Tile>
  static void load(const void *rows, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(Tile) : "memory");
  }
  // The same for rows that need not stay in the level-1 cache.
  template <int Tile>
  static void load_passing(const void *rows, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(Tile) : "memory");
  }
  template <int Tile>
  static void store(void *rows, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(Tile) : "memory");
  }
  // sums[m][n] += sum over k and i < 4 of a[m][4k + i] * b[k][4n + i]: int32 sums of signed bytes.
  template <int Sums, int A, int B>
  static void dot() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B) : "memory");
  }
  // sums[m][n] += (sum over k of a[m][2k] * b[k][2n]) + (sum over k of a[m][2k + 1] * b[k][2n + 1]): float32 sums of
  // bfloat16.
  template <int Sums, int A, int B>
  static void dot_bfloats() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B) : "memory");
  }
};

// Configures the tiles of its thread, and releases them when it goes.
class ConfiguredTiles {
 public:
  ConfiguredTiles() = default;
  ~ConfiguredTiles() {
    if (configured_) AmxTiles::release();
  }
  ConfiguredTiles(const ConfiguredTiles &) = delete;
  ConfiguredTiles &operator=(const ConfiguredTiles &) = delete;

  void configure(const TileShapes &shapes) {
    configured_ = true;
    AmxTiles::configure(shapes);
  }

 private:
  bool configured_ = false;
};

}  // namespace
}  // namespace mnemos
