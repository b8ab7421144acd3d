// The part of the machine that this process may use.
#pragma once

#include <cstdint>
#include <vector>

namespace mnemos {

// Cores in the affinity mask, limited by the cgroup's CPU quota (rounded up), at least 1.
int usable_cores();

// The core that this thread runs on; -1 if unknown.
int current_core();

// Has the system move this thread to a core that is not among `cores`, if it may use one. It stays free to move on.
void leave_cores(const std::vector<int> &cores);

// Asks the system to let this thread run soon after it wakes, in short turns, for the same share of time as before.
// Linux does from 6.12 on; elsewhere nothing changes.
void prefer_short_turns();

// Bytes of memory that can still be allocated: what the system has available, limited by what the cgroup leaves.
// Negative if unknown.
int64_t available_memory();

}  // namespace mnemos
