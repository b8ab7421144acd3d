#include "system/pool.h"

#include <chrono>
#include <string>

#include "system/cores.h"
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

// The gap between two steps (sampling, scheduling) is below this, so that threads rarely sleep while text is generated,
// and soon do when it is not.
constexpr auto spin_between_regions = std::chrono::microseconds(500);
// Inside a region the others are late by microseconds, unless one has lost its core: then it may well go on with ours.
constexpr auto spin_inside_region = std::chrono::microseconds(100);
constexpr auto polite_after = std::chrono::microseconds(40);

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spins until done() or until it is time to sleep; after some microseconds it lets other threads of the core go first.
template <typename Done>
bool spin_until(const Done &done, std::chrono::microseconds most) {
  for (int i = 0; i < 200; i++) {
    if (done()) return true;
    relax();
  }
  const auto start = Clock::now();
  for (;;) {
    for (int i = 0; i < 32; i++) {
      if (done()) return true;
      relax();
    }
    const auto waited = Clock::now() - start;
    if (waited > most) return done();
    if (waited > polite_after) std::this_thread::yield();
  }
}

}  // namespace

void Barrier::wait() {
  if (threads_ == 1) return;
  const uint32_t generation = generation_.load();
  if (arrived_.fetch_add(1) == threads_ - 1) {
    arrived_.store(0);
    generation_.store(generation + 1);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    return;
  }
  const auto passed = [&] { return generation_.load() != generation; };
  if (spin_until(passed, spin_inside_region)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);
  wake_.wait(lock, passed);
  sleepers_.fetch_sub(1);
}

struct Pool::Crew {
  explicit Crew(int threads) : barrier(threads), running(0) {
    for (int i = 1; i < threads; i++) workers.emplace_back([this, i] { work(i); });
  }

  ~Crew() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
      generation.fetch_add(1);
    }
    wake.notify_all();
    for (std::thread &worker : workers) worker.join();
  }

  void start_region(const std::function<void(int)> &region) {
    body = &region;
    running.store(static_cast<int>(workers.size()));
    generation.fetch_add(1);
    if (sleepers.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
  }

  void finish_region() {
    const auto done = [&] { return running.load() == 0; };
    if (spin_until(done, spin_inside_region)) return;
    std::unique_lock<std::mutex> lock(mutex);
    caller_sleeps.store(true);
    finished.wait(lock, done);
    caller_sleeps.store(false);
  }

  void work(int index) {
    for (uint32_t seen = 0;; seen++) {
      const auto called = [&] { return generation.load() != seen; };
      if (!spin_until(called, spin_between_regions)) {
        std::unique_lock<std::mutex> lock(mutex);
        sleepers.fetch_add(1);
        wake.wait(lock, called);
        sleepers.fetch_sub(1);
      }
      if (stop) return;
      (*body)(index);
      if (running.fetch_sub(1) == 1 && caller_sleeps.load()) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }

  Barrier barrier;
  std::vector<std::thread> workers;
  const std::function<void(int)> *body = nullptr;
  std::atomic<uint32_t> generation{0};
  std::atomic<int> running;
  std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false}, caller_sleeps{false};
  std::mutex mutex;
  std::condition_variable wake, finished;
};

Pool::Pool(int threads) : threads_(threads) {
  const int cores = usable_cores();
  if (threads < 1 || threads > cores) {
    throw config_error("threads is " + std::to_string(threads) + "; this process may use " + std::to_string(cores) +
                       " cores: choose 1 to " + std::to_string(cores));
  }
}

Pool::~Pool() {
  wanted_.store(true);
  if (process_ != getpid()) crew_.release();  // threads of the parent process: nothing to join here
  crew_.reset();  // before what may run behind
}

void Pool::start() {
  if (crew_ && process_ == getpid()) return;
  crew_.release();  // either empty or the parent's, whose threads this process does not have
  crew_ = std::make_unique<Crew>(threads_);
  process_ = getpid();
}

void Pool::run(const std::function<void(int)> &body) {
  std::lock_guard<std::mutex> lock(region_);
  if (threads_ == 1) {
    body(0);
    return;
  }
  start();
  end_behind();
  crew_->start_region(body);
  body(0);
  crew_->finish_region();
}

void Pool::run_behind(std::function<void(int)> body) {
  std::lock_guard<std::mutex> lock(region_);
  if (threads_ == 1) return;
  start();
  end_behind();
  behind_ = std::move(body);
  crew_->start_region(behind_);
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

void Pool::barrier() {
  if (threads_ > 1) crew_->barrier.wait();
}

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
