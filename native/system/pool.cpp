#include "system/pool.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <string>

#include "system/cores.h"
#include "system/denormals.h"
#include "system/error.h"

#if defined(_WIN32)
#include <process.h>
#define getpid _getpid
#else
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mnemos {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

// The gap between two steps (sampling, scheduling) is below this, so that threads rarely sleep while text is generated,
// but soon do when it is not.
constexpr auto spin_between_regions = microseconds(500);
// Inside a region the others are late by microseconds, unless one has lost its core: then it may well continue on ours.
constexpr auto spin_inside_region = microseconds(100);
constexpr auto polite_after = microseconds(40);

// How long threads wait in one region before one is sent away, and the minimum share of its time: a step has
// a hundred barriers, at each of which a thread may lack its core for milliseconds.
constexpr auto most_waiting = milliseconds(5);
constexpr double waiting_share = 0.6;
// A thread that has moved to another core gives the system this long before it moves again.
constexpr auto settling = milliseconds(1);
// Long enough for several steps, and for a core to be lost and regained.
constexpr auto window = milliseconds(20);
constexpr auto shortest_rest = milliseconds(20), longest_rest = milliseconds(640);
// The minimum gain from fewer threads.
constexpr double clear_gain = 1.1;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Most waits are over before reading the clock pays off.
template <typename Done>
bool soon(const Done &done) {
  for (int i = 0; i < 16; i++) {
    if (done()) return true;
    relax();
  }
  return false;
}

// Spins until done() or until it is time to sleep, by the clock: a pause takes 40 cycles on one processor and 140 on
// another. After some microseconds it yields to other threads of the core.
template <typename Done>
bool spin_until(const Done &done, Clock::time_point start, microseconds most) {
  for (;;) {
    for (int i = 0; i < 4; i++) {
      if (done()) return true;
      relax();
    }
    const auto waited = Clock::now() - start;
    if (waited > most) return done();
    if (waited > polite_after) std::this_thread::yield();
  }
}

// This thread's running time in nanoseconds. If the system does not report it, it counts as running all the time.
int64_t own_time() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec time{};
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
#endif
  return nanoseconds(Clock::now().time_since_epoch()).count();
}

}  // namespace

template <typename Complete>
int64_t Barrier::wait(int threads, const Complete &complete) {
  if (threads == 1) return 0;
  const uint32_t generation = generation_.load();
  if (arrived_.fetch_add(1) == threads - 1) {
    arrived_.store(0);
    complete();
    if (sleepers_.load() > 0) complete_ = Clock::now();
    generation_.store(generation + 1);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    return 0;
  }
  const auto passed = [&] { return generation_.load() != generation; };
  if (soon(passed)) return 0;
  const auto start = Clock::now();
  auto end = start;
  if (spin_until(passed, start, spin_inside_region)) {
    end = Clock::now();
  } else {
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, passed);
    sleepers_.fetch_sub(1);
    end = std::max(complete_, start + spin_inside_region);  // belongs to another wait if the last thread has just come
  }
  return end - start > polite_after ? nanoseconds(end - start).count() : 0;
}

void Team::record(Clock::time_point now, nanoseconds took, nanoseconds waited, nanoseconds lost) {
  if (size_ < all_ && !trying_ && now >= next_try_) {
    size_++, trying_ = true;
    return begin_window();
  }
  if (size_ == 1) return;
  took_ += took, waited_ += waited, lost_ += lost;
  if (took_ < window) return;
  // While one thread has no core, all others wait for it. An uneven division of work makes them wait too, but then
  // every thread has its core.
  const double held_up =
      static_cast<double>(std::min(waited_ / (size_ - 1), lost_).count()) / static_cast<double>(took_.count());
  const double share_of_fewer = static_cast<double>(size_ - 1) / size_;
  if ((1 - held_up) * clear_gain < share_of_fewer) {
    return shrink(now);
  }
  if (trying_) next_try_ = now + rest_;  // the cores are free again: add one thread, if possible
  trying_ = false;
  begin_window();
}

void Team::shrink(Clock::time_point now) {
  size_--;
  rest_ = trying_ ? std::min<nanoseconds>(2 * rest_, longest_rest) : shortest_rest;
  next_try_ = now + rest_;
  trying_ = false;
  begin_window();
}

struct Pool::Crew {
  // What one thread of the crew notes about itself.
  struct alignas(64) Member {
    std::atomic<bool> asleep{false};
    Clock::time_point moved;  // when it last left a core that it shared
    int64_t before = 0;  // its running time at the region's begin
    int64_t waited = 0;  // nanoseconds that it waited for others in the region
  };

  explicit Crew(int threads)
      : members(new Member[static_cast<size_t>(threads)]), cores(new std::atomic<int>[static_cast<size_t>(threads)]()) {
    for (int i = 1; i < threads; i++) workers.emplace_back([this, i] { work(i); });
  }

  ~Crew() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
      call(0);
    }
    wake.notify_all();
    for (std::thread &worker : workers) worker.join();
  }

  // A region's number and its threads change together, so that a worker that is late does not take part in a region
  // that does without it.
  void call(int team) { region.store((number(region.load()) + 1) << 32 | static_cast<uint32_t>(team)); }
  static uint64_t number(uint64_t region) { return region >> 32; }
  static int team_of(uint64_t region) { return static_cast<int>(region & 0xffffffff); }

  void start_region(const std::function<void(int)> &work_of_region, int threads) {
    team = threads, body = &work_of_region;
    begin = Clock::now();
    note_core(0);
    waited.store(0, std::memory_order_relaxed), without_core.store(0, std::memory_order_relaxed);
    if (team == 1) return;  // sleeping threads keep sleeping
    running.store(team - 1);
    call(team);
    for (int worker = 1; worker < team; worker++) {
      if (!member(worker).asleep.load()) continue;
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
      break;
    }
  }

  // The caller's part is done: wait for the others.
  void finish_region() {
    const auto done = [&] { return running.load() == 0; };
    const auto start = Clock::now();
    if (!spin_until(done, start, spin_inside_region)) {
      std::unique_lock<std::mutex> lock(mutex);
      caller_sleeps.store(true);
      finished.wait(lock, done);
      caller_sleeps.store(false);
    }
    const auto late = Clock::now() - start;
    if (late > polite_after) waited.fetch_add(nanoseconds(late).count(), std::memory_order_relaxed);
  }

  Member &member(int index) const { return members[static_cast<size_t>(index)]; }

  int note_core(int index) {
    std::atomic<int> &noted = cores[static_cast<size_t>(index)];
    const int here = current_core();
    if (noted.load(std::memory_order_relaxed) != here) noted.store(here, std::memory_order_relaxed);
    return here;
  }

  // Two threads on one core take turns where they should run side by side, and wait for each other at every barrier.
  // The system puts them there when it wakes a thread while others use the remaining cores for a moment, and may leave
  // them there for many regions. So a worker that is on the core of a thread with a smaller index goes elsewhere.
  void spread(int index) {
    const int here = note_core(index);
    const auto on = [&](int other) { return cores[static_cast<size_t>(other)].load(std::memory_order_relaxed); };
    int other = 0;
    while (other < index && on(other) != here) other++;
    if (other == index || here < 0) return;
    const auto now = Clock::now();
    if (now - member(index).moved < settling) return;
    member(index).moved = now;
    std::vector<int> taken;
    for (int i = 0; i < team; i++) taken.push_back(on(i));
    leave_cores(taken);
    note_core(index);
  }

  void run_body(int index) {
    spread(index);
    member(index).before = own_time(), member(index).waited = 0;
    (*body)(index);
    without_core.fetch_add(lost(index).count(), std::memory_order_relaxed);
  }

  // How long a thread has been without a core in this region, other than to wait for the others.
  nanoseconds lost(int index) const {
    const Member &self = member(index);
    return Clock::now() - begin - nanoseconds(own_time() - self.before + self.waited);
  }

  // False if the thread is to leave.
  bool meet(int index) {
    spread(index);
    const int64_t time = barrier.wait(team, [this, index] {
      const auto each = nanoseconds(waited.load(std::memory_order_relaxed) / (team - 1));
      // A thread that had more to do, or waited for a page of memory, keeps the others waiting too, but has its core.
      if (each < most_waiting || lost(index) < each / 2) return;
      if (each > waiting_share * (Clock::now() - begin)) team--;
    });
    if (time > 0) {
      waited.fetch_add(time, std::memory_order_relaxed);
      member(index).waited += time;
    }
    return index < team;
  }

  void work(int index) {
    const DenormalsAreZero denormals;
    std::atomic<bool> &sleeping = member(index).asleep;
    bool spins = true;
    for (uint64_t seen = 0;;) {
      const auto called = [&] { return number(region.load()) != seen; };
      if (!spins || !spin_until(called, Clock::now(), spin_between_regions)) {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping.store(true);
        wake.wait(lock, called);
        sleeping.store(false);
      }
      if (stop) return;
      const uint64_t now = region.load();
      seen = number(now);
      spins = index < team_of(now);  // a region without this thread is soon followed by another
      if (!spins) continue;
      run_body(index);
      if (running.fetch_sub(1) == 1 && caller_sleeps.load()) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }

  Barrier barrier;
  std::unique_ptr<Member[]> members;  // by index
  std::unique_ptr<std::atomic<int>[]> cores;  // by index: where each thread ran when it last looked
  std::vector<std::thread> workers;
  const std::function<void(int)> *body = nullptr;
  int team = 1;  // of the running region
  Clock::time_point begin;
  std::atomic<uint64_t> region{0};
  // Nanoseconds that threads of the region waited for others, and that they were without a core otherwise.
  std::atomic<int64_t> waited{0}, without_core{0};
  std::atomic<int> running{0};
  std::atomic<bool> stop{false}, caller_sleeps{false};
  std::mutex mutex;
  std::condition_variable wake, finished;
};

Pool::Pool(int threads) : threads_(threads), record_(threads), team_(threads) {
  const int cores = usable_cores();
  if (threads < 1 || threads > cores) {
    throw config_error("threads is " + std::to_string(threads) + "; this process may use " + std::to_string(cores) +
                       " cores: choose 1 to " + std::to_string(cores));
  }
}

Pool::~Pool() {
  wanted_.store(true);
  if (process_ != getpid()) crew_.release();  // threads of the parent process: nothing to join here
  crew_.reset();  // before what may run in the background
}

void Pool::start() {
  if (crew_ && process_ == getpid()) return;
  crew_.release();  // either empty or the parent's, whose threads this process does not have
  crew_ = std::make_unique<Crew>(threads_);
  process_ = getpid();
}

void Pool::run(int team, const std::function<void(int)> &body) {
  std::lock_guard<std::mutex> lock(region_);
  const DenormalsAreZero denormals;
  if (threads_ == 1) return body(0);
  start();
  end_behind();
  crew_->start_region(body, team);
  crew_->run_body(0);
  crew_->finish_region();
  if (team != record_.size()) return;
  const auto end = Clock::now();
  if (crew_->team < team) {
    record_.shrink(end);
    return team_.store(record_.size(), std::memory_order_relaxed);
  }
  record_.record(end, end - crew_->begin, nanoseconds(crew_->waited.load(std::memory_order_relaxed)),
                 nanoseconds(crew_->without_core.load(std::memory_order_relaxed)));
  team_.store(record_.size(), std::memory_order_relaxed);
}

void Pool::run_behind(std::function<void(int)> body) {
  std::lock_guard<std::mutex> lock(region_);
  if (threads_ == 1) return;
  start();
  end_behind();
  behind_ = std::move(body);
  crew_->start_region(behind_, threads_);
}

void Pool::interrupt() {
  std::lock_guard<std::mutex> lock(region_);
  if (process_ == getpid()) end_behind();  // a forked child has none of the threads
}

void Pool::end_behind() {
  if (!behind_) return;
  wanted_.store(true);
  crew_->finish_region();
  wanted_.store(false);
  behind_ = nullptr;
}

bool Pool::barrier(int thread) { return threads_ == 1 || crew_->meet(thread); }

void Pool::for_each(int64_t items, int64_t chunk,
                    const std::function<void(int64_t begin, int64_t end, int thread)> &body) {
  std::atomic<int64_t> next{0};
  run([&](int thread) {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < items;) {
      body(begin, begin + chunk < items ? begin + chunk : items, thread);
    }
  });
}

std::shared_ptr<Pool> shared_pool(int threads) {
  static std::mutex mutex;
  static std::vector<std::shared_ptr<Pool>> pools;  // they live as long as the process: an engine may come back
  const int wanted = threads == 0 ? usable_cores() : threads;
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto &pool : pools) {
    if (pool->threads() == wanted) return pool;
  }
  pools.push_back(std::make_shared<Pool>(wanted));
  return pools.back();
}

}  // namespace mnemos
