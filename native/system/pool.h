// One set of threads that engines share: parallel regions with barriers, on the cores that the process may truly use.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "system/cores.h"

namespace mnemos {

// Where the threads of a region meet. They spin for as long as the others usually take, then sleep.
class Barrier {
 public:
  // Called by `threads` threads, the last of which calls complete() before the others continue. Returns the time until
  // then in nanoseconds, if more than a few microseconds.
  template <typename Complete>
  int64_t wait(int threads, const Complete &complete);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> sleepers_{0};
  std::chrono::steady_clock::time_point complete_;  // when the last thread came
  std::mutex mutex_;
  std::condition_variable wake_;
};

// How many threads a region gets. Where other programs use the cores too, a thread that has lost its core for some
// milliseconds holds up all others at the next barrier: then fewer threads, which the system finds cores for, do more.
// Results do not depend on it. Only the thread that starts regions may use it.
class Team {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Team(int threads) : all_(threads), size_(threads) {}
  int size() const { return size_; }
  // A region of size() threads is over. waited: the total wait for each other; lost: the total time without a core when
  // they could have run.
  void record(Clock::time_point now, std::chrono::nanoseconds took, std::chrono::nanoseconds waited,
              std::chrono::nanoseconds lost);
  // The last thread was sent away during the region.
  void shrink(Clock::time_point now);

 private:
  void begin_window() { took_ = waited_ = lost_ = std::chrono::nanoseconds(0); }

  const int all_;
  int size_;
  bool trying_ = false;  // one more thread than before, to test whether the cores are free again
  std::chrono::nanoseconds took_{0}, waited_{0}, lost_{0};
  std::chrono::nanoseconds rest_{0};  // how long fewer threads run before one more is tried
  Clock::time_point next_try_;
};

class Pool {
 public:
  // Throws Error (config) if `threads` is not between 1 and usable_cores().
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int threads() const { return threads_; }
  // The threads that a region should have now, at most threads(): fewer if other programs keep taking cores away.
  int team() const { return team_.load(std::memory_order_relaxed); }

  // Calls body(thread index) once on each of `team` threads, the caller being number 0, and returns when all are
  // done. Regions of different callers run one after the other. `body` must not throw. Denormal numbers count as zero
  // in it.
  void run(int team, const std::function<void(int)> &body);
  void run(const std::function<void(int)> &body) { run(threads_, body); }

  // Calls body(thread index) on all threads but the caller's and returns immediately. This work may be left undone:
  // body returns soon after wanted() says so. A region, another such call or interrupt() ends it.
  void run_behind(std::function<void(int)> body);
  bool wanted() const { return wanted_.load(std::memory_order_relaxed); }
  // Returns when nothing runs in the background.
  void interrupt();

  // Inside a region: waits until all of its threads are here. False: this thread must leave the region, and others do
  // what it has not begun; so only regions whose threads take work from a common supply may have barriers.
  bool barrier(int thread);

  // A separate region that hands out 0..items in chunks, so that a slow core does not hold up the others.
  void for_each(int64_t items, int64_t chunk, const std::function<void(int64_t begin, int64_t end, int thread)> &body);

 private:
  struct Crew;  // the threads and what they share; recreated in a forked child, where threads do not survive
  void start();
  void end_behind();

  const int threads_;
  std::mutex region_;
  std::unique_ptr<Crew> crew_;
  long process_ = 0;
  std::function<void(int)> behind_;  // empty: nothing runs in the background
  std::atomic<bool> wanted_{false};
  Team record_;
  std::atomic<int> team_;  // record_.size(), for other threads
};

// The pool of that size, shared by all users in this process. 0 means usable_cores().
std::shared_ptr<Pool> shared_pool(int threads);

}  // namespace mnemos
