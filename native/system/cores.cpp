#include "system/cores.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mnemos {
namespace {

#if defined(__linux__)
constexpr const char *cgroup_root = "/sys/fs/cgroup";

std::string read_file(const std::string &path) {
  std::ifstream file(path);
  std::stringstream content;
  content << file.rdbuf();
  return file ? content.str() : std::string();
}

int64_t read_number(const std::string &path) {
  std::istringstream text(read_file(path));
  int64_t value = -1;
  return text >> value ? value : -1;  // "max" and missing files alike mean no limit
}

// The path of this process below the mount point of one controller; the unified hierarchy has an empty name.
std::string cgroup_path(const std::string &controller) {
  std::istringstream lines(read_file("/proc/self/cgroup"));
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string names = "," + line.substr(first + 1, second - first - 1) + ",";
    if (names == "," + controller + "," ||
        (!controller.empty() && names.find("," + controller + ",") != std::string::npos))
      return line.substr(second + 1);
  }
  return "/";
}

// Calls visit(directory) for the process's own group and all groups above it: any of them may set a limit.
template <typename Visit>
void for_each_group(const std::string &mount, std::string path, const Visit &visit) {
  for (;;) {
    visit(mount + (path == "/" ? "" : path));
    if (path.empty() || path == "/") return;
    path = path.substr(0, path.find_last_of('/'));
  }
}

// Cores' worth of CPU time that the cgroups grant; infinite without a quota.
double cpu_quota() {
  double cores = INFINITY;
  const auto limit = [&](double quota, double period) {
    if (quota > 0 && period > 0) cores = std::min(cores, quota / period);
  };
  for_each_group(cgroup_root, cgroup_path(""), [&](const std::string &group) {
    std::istringstream text(read_file(group + "/cpu.max"));
    double quota = 0, period = 0;
    if (text >> quota >> period) limit(quota, period);
  });
  for_each_group(std::string(cgroup_root) + "/cpu", cgroup_path("cpu"), [&](const std::string &group) {
    limit(static_cast<double>(read_number(group + "/cpu.cfs_quota_us")),
          static_cast<double>(read_number(group + "/cpu.cfs_period_us")));
  });
  return cores;
}

int affinity_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

int64_t system_memory() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  for (int64_t value; file >> key >> value; std::getline(file, unit)) {
    if (key == "MemAvailable:") return value * 1024;
  }
  return -1;
}

// The page cache counts as used by a cgroup but is reclaimed when needed, so inactive file pages count as free.
int64_t reclaimable(const std::string &group, const std::string &key) {
  std::istringstream lines(read_file(group + "/memory.stat"));
  std::string name;
  for (int64_t value; lines >> name >> value;) {
    if (name == key) return value;
  }
  return 0;
}

int64_t cgroup_memory() {
  int64_t least = INT64_MAX;
  const auto limit = [&](const std::string &group, const char *max, const char *used, const char *inactive) {
    const int64_t most = read_number(group + max), now = read_number(group + used);
    if (most > 0 && now >= 0) least = std::min(least, most - now + reclaimable(group, inactive));
  };
  for_each_group(cgroup_root, cgroup_path(""),
                 [&](const std::string &group) { limit(group, "/memory.max", "/memory.current", "inactive_file"); });
  for_each_group(std::string(cgroup_root) + "/memory", cgroup_path("memory"), [&](const std::string &group) {
    limit(group, "/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_inactive_file");
  });
  return least;
}
#endif

}  // namespace

int usable_cores() {
#if defined(__linux__)
  const double quota = cpu_quota();
  const int cores = affinity_cores();
  return std::max(1, std::isinf(quota) ? cores : std::min(cores, static_cast<int>(std::ceil(quota))));
#else
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#endif
}

int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

void leave_cores(const std::vector<int> &cores) {
#if defined(__linux__)
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  for (const int core : cores) {
    if (core >= 0 && core < CPU_SETSIZE) CPU_CLR(static_cast<size_t>(core), &others);
  }
  if (CPU_COUNT(&others) == 0) return;
  if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
#else
  (void)cores;
#endif
}

void prefer_short_turns() {
#if defined(__linux__) && defined(SYS_sched_getattr) && defined(SYS_sched_setattr)
  // struct sched_attr of Linux's <linux/sched/types.h>, which the C library's <sched.h> may define too.
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes{};
  constexpr uint64_t turn = 500'000;  // nanoseconds; the system's own are some milliseconds
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0 || attributes.policy != SCHED_OTHER) return;
  attributes.runtime = turn;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
#endif
}

int64_t available_memory() {
#if defined(__linux__)
  const int64_t system = system_memory();
  return system < 0 ? system : std::max<int64_t>(0, std::min(system, cgroup_memory()));
#else
  return -1;
#endif
}

}  // namespace mnemos
