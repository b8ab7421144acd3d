// One set of threads that engines share: parallel regions of phases, on the cores that the process may truly use.
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

class Pool {
 public:
  // Throws Error (config) if `threads` is not between 1 and usable_cores().
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int threads() const { return threads_; }

  // Calls body(thread index) once on each thread, the caller being number 0, and returns when all are done. Regions of
  // different callers run one after the other. `body` must not throw. Denormal numbers count as zero in it.
  void on_each(const std::function<void(int)> &body);

  // How the threads of a region take part in it.
  enum class Team {
    fixed,  // all from the first phase to the last
    open,  // those that have a core: they join when they come, and leave before they lose it
  };
  // Calls body(thread index, phase) for phases 0 to phases - 1: no call of a phase begins before all calls of the one
  // before it have returned. A phase is called on up to `threads` threads at once, so its work must come from a common
  // supply; on each of them exactly once if the team is fixed, on one or more if it is open.
  void share(int threads, int phases, Team team, const std::function<void(int thread, int phase)> &body);
  // Whether other programs have kept taking cores away lately: then a fixed team waits for those without one.
  bool contended() const;

  // Calls body(thread index) on all threads but the caller's and returns immediately. This work may be left undone:
  // body returns soon after wanted() says so, and a thread that has no core until then does not begin. A region,
  // another such call or interrupt() ends it.
  void run_behind(std::function<void(int)> body);
  bool wanted() const { return wanted_.load(std::memory_order_relaxed); }
  // Returns when nothing runs in the background.
  void interrupt();

  // A separate region that hands out 0..items in chunks, so that a slow core does not hold up the others.
  void for_each(int64_t items, int64_t chunk, const std::function<void(int64_t begin, int64_t end, int thread)> &body);

 private:
  struct Crew;  // the threads and what they share; recreated in a forked child, where threads do not survive
  void start();
  void run(int threads, int phases, Team team, const std::function<void(int, int)> &body);
  void end_behind();

  const int threads_;
  std::mutex region_;
  std::unique_ptr<Crew> crew_;
  long process_ = 0;
  std::function<void(int, int)> behind_;  // empty: nothing runs in the background
  std::atomic<bool> wanted_{false};
  std::atomic<int64_t> contended_until_{0};  // nanoseconds of the steady clock
};

// The pool of that size, shared by all users in this process. 0 means usable_cores().
std::shared_ptr<Pool> shared_pool(int threads);

}  // namespace mnemos
