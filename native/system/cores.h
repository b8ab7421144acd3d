// What this process may use of the machine.
#pragma once

#include <cstdint>

namespace mnemos {

// Cores: the affinity mask, cut down to the CPU quota of the cgroup (rounded up), at least 1.
int usable_cores();

// Bytes of memory that can still be taken: what the system has available, cut down to what the cgroup's limit leaves.
// Negative if the system does not tell.
int64_t available_memory();

}  // namespace mnemos
