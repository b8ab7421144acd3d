// How fast this machine reads memory: the ceiling of decoding, where every weight is read once a token.
#pragma once

#include <cstdint>

#include "pool.h"

namespace mnemos {

// Bytes a second that all threads of the pool together read in sequence from `bytes` bytes: the best of `repeats` times.
double read_bandwidth(Pool &pool, int64_t bytes, int repeats);

}  // namespace mnemos
