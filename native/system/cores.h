// The part of the machine that this process may use.
#pragma once

#include <cstdint>

namespace mnemos {

// Cores in the affinity mask, limited by the cgroup's CPU quota (rounded up), at least 1.
int usable_cores();

// Bytes of memory that can still be allocated: what the system has available, limited by what the cgroup leaves.
// Negative if unknown.
int64_t available_memory();

}  // namespace mnemos
