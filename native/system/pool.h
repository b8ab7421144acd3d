// One set of threads that engines share: parallel regions with barriers, on the cores that the process may really use.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "system/cores.h"

namespace mnemos {

// Where threads meet. Spins for a while, because the others usually arrive within microseconds, then sleeps.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait();

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Pool {
 public:
  // Throws Error (config) if `threads` is not between 1 and usable_cores().
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int threads() const { return threads_; }

  // Calls body(thread index) once on every thread of the pool, the caller's being number 0, and returns when all are
  // done. Regions of different callers run one after the other. `body` must not throw.
  void run(const std::function<void(int)> &body);

  // Calls body(thread index) on all threads but the caller's and returns at once. It is work that may be left undone:
  // body returns soon after wanted() says so. A region, another such call or interrupt() ends it.
  void run_behind(std::function<void(int)> body);
  bool wanted() const { return wanted_.load(std::memory_order_relaxed); }
  // Returns when nothing runs behind.
  void interrupt();

  // Inside a region: waits until all threads of the pool are here.
  void barrier();

  // A region of its own that hands out 0..items in chunks, so that a slow core does not hold up the others.
  void for_each(int64_t items, int64_t chunk, const std::function<void(int64_t begin, int64_t end, int thread)> &body);

 private:
  struct Crew;  // the threads and what they share; made anew in a forked child, where threads do not survive
  void start();
  void end_behind();

  const int threads_;
  std::mutex region_;
  std::unique_ptr<Crew> crew_;
  long process_ = 0;
  std::function<void(int)> behind_;  // empty: nothing runs behind
  std::atomic<bool> wanted_{false};
};

// The pool of that size, shared by all who ask for it in this process. 0 means usable_cores().
std::shared_ptr<Pool> shared_pool(int threads);

}  // namespace mnemos
