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

// A thread that has moved to another core gives the system this long before it moves again.
constexpr auto settling = milliseconds(1);

// A thread that finds that it could not run for this long had to leave its core to another program.
constexpr auto lost_core = microseconds(500);
// How long cores count as contended, relative to the time that they were lost for, and at most.
constexpr int memory_of_losses = 5;
constexpr auto longest_memory = milliseconds(1000);
// How long the system lets a thread run before another has its turn: it is not told, so threads learn it.
constexpr auto first_turn = microseconds(3000), shortest_turn = microseconds(1000), longest_turn = microseconds(20000);

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

// Whether a time of the steady clock in nanoseconds, 0 if there is none, is still to come.
bool is_ahead(const std::atomic<int64_t> &time) {
  const int64_t then = time.load(std::memory_order_relaxed);
  return then != 0 && then > nanoseconds(Clock::now().time_since_epoch()).count();
}

// Spins until done() or until it is time to sleep, by the clock: a pause takes 40 cycles on one processor and 140 on
// another. If polite, it yields to other threads of the core after some microseconds.
template <typename Done>
bool spin_until(const Done &done, Clock::time_point start, microseconds most, bool polite) {
  for (;;) {
    for (int i = 0; i < 4; i++) {
      if (done()) return true;
      relax();
    }
    const auto waited = Clock::now() - start;
    if (waited > most) return done();
    if (polite && waited > polite_after) std::this_thread::yield();
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

// Who takes part in the running region and how far it is, in one word, so that threads meet, join and leave without
// locks: 26 bits for the region's number, 17 for its phase, a bit for an open team, 10 for the threads that have
// finished the phase, and 10 for those of the team.
class Roll {
 public:
  static constexpr uint64_t over = (1 << 17) - 1;  // the phase of a region that has ended
  static constexpr uint64_t arrival = 1 << 10;  // what a thread that has finished a phase adds
  static constexpr int most_threads = (1 << 10) - 1;

  explicit Roll(uint64_t word = over << 21) : word_(word) {}
  uint64_t word() const { return word_; }
  uint64_t region() const { return word_ >> 38; }
  uint64_t phase() const { return word_ >> 21 & over; }
  bool is_over() const { return phase() == over; }
  bool open() const { return word_ >> 20 & 1; }
  uint64_t arrived() const { return word_ >> 10 & most_threads; }
  uint64_t team() const { return word_ & most_threads; }
  bool last() const { return arrived() + 1 == team(); }
  bool full() const { return team() > 0 && arrived() == team(); }
  bool same_phase(Roll other) const { return (word_ ^ other.word_) >> 21 == 0; }

  Roll next_region(int threads, bool open) const {
    return Roll((region() + 1) << 38 | uint64_t(open) << 20 | static_cast<uint64_t>(threads));
  }
  Roll next_phase(uint64_t phases) const {
    const uint64_t next = phase() + 1 == phases ? over : phase() + 1;
    return Roll(region() << 38 | next << 21 | uint64_t(open()) << 20 | team());
  }
  Roll ended() const { return Roll(word_ | over << 21); }
  Roll with_member() const { return Roll(word_ + 1); }
  Roll without_member() const { return Roll(word_ - 1); }

 private:
  uint64_t word_;
};

}  // namespace

struct Pool::Crew {
  // What one thread notes about itself.
  struct alignas(64) Member {
    std::atomic<bool> asleep{false};
    std::atomic<int64_t> contended_until{0};  // of its core, nanoseconds of the steady clock
    bool short_turns = false;  // has asked the system for them
    bool turn_over = false;  // it should leave its core after the phase
    Clock::time_point moved;  // when it last left a core that it shared
    Clock::time_point seen;  // when it last looked at the clock
    Clock::time_point since;  // since when it has had its core
    Clock::time_point marked;  // when it last compared the clock with its running time
    int64_t ran = 0;  // its running time then, in nanoseconds
  };

  Crew(int threads, std::atomic<int64_t> *contended_until)
      : members(new Member[static_cast<size_t>(threads)]), cores(new std::atomic<int>[static_cast<size_t>(threads)]()),
        contended_until(contended_until) {
    for (int i = 1; i < threads; i++) workers.emplace_back([this, i] { work(i); });
  }

  ~Crew() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
      roll.store(now().next_region(0, true).ended().word());
    }
    wake.notify_all();
    for (std::thread &worker : workers) worker.join();
  }

  Roll now() const { return Roll(roll.load()); }
  bool contended() const { return is_ahead(*contended_until); }
  Member &member(int index) const { return members[static_cast<size_t>(index)]; }

  // Begins a region of `threads` threads, of which threads 0 to present - 1 belong to an open team at once, and all to
  // a fixed one. Only the caller, thread 0, may begin one, when none runs.
  void begin(int threads, int present, int phases, Team kind, const std::function<void(int, int)> &work_of_phase) {
    body = &work_of_phase;
    limit.store(threads, std::memory_order_relaxed), last_phase = static_cast<uint64_t>(phases);
    roll.store(now().next_region(kind == Team::open ? present : threads, kind == Team::open).word());
    for (int worker = 1; worker < threads; worker++) {
      if (!member(worker).asleep.load()) continue;
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
      break;
    }
  }

  // Ends a region that nobody is in, or waits for those who are.
  void end() {
    uint64_t seen = roll.load();
    while (Roll(seen).team() == 0 && !Roll(seen).is_over()) {
      if (roll.compare_exchange_weak(seen, Roll(seen).ended().word())) return;
    }
    wait_inside(0, [this] { return now().is_over(); });
  }

  // For a thread that has arrived at the end of a phase, or of a region.
  template <typename Done>
  void wait_inside(int index, const Done &done) {
    // Yielding to another program gives it a whole turn.
    if (soon(done) || spin_until(done, Clock::now(), spin_inside_region, !contended())) return;
    {
      std::unique_lock<std::mutex> lock(mutex);
      sleepers.fetch_add(1);
      passed.wait(lock, done);
      sleepers.fetch_sub(1);
    }
    const auto time = Clock::now();
    mark(index, time);
    member(index).since = time;
  }

  int note_core(int index) {
    std::atomic<int> &noted = cores[static_cast<size_t>(index)];
    const int here = current_core();
    if (noted.load(std::memory_order_relaxed) != here) noted.store(here, std::memory_order_relaxed);
    return here;
  }

  // Two threads on one core take turns where they should run side by side, and wait for each other after every phase.
  // The system puts them there when it wakes a thread while others use the remaining cores for a moment, and may leave
  // them there for many regions. So a worker that is on the core of a thread with a smaller index goes elsewhere.
  void spread(int index) {
    const int here = note_core(index);
    const auto on = [&](int other) { return cores[static_cast<size_t>(other)].load(std::memory_order_relaxed); };
    int other = 0;
    while (other < index && on(other) != here) other++;
    if (other == index || here < 0) return;
    const auto time = Clock::now();
    if (time - member(index).moved < settling) return;
    member(index).moved = time;
    std::vector<int> taken;
    for (int i = 0; i < limit.load(std::memory_order_relaxed); i++) taken.push_back(on(i));
    leave_cores(taken);
    note_core(index);
  }

  // Compares the time that has passed since the thread last did so with its running time.
  nanoseconds mark(int index, Clock::time_point time) {
    Member &self = member(index);
    const int64_t running = own_time();
    const nanoseconds absent = (time - self.marked) - nanoseconds(running - self.ran);
    self.seen = self.marked = time, self.ran = running;
    return absent;
  }

  // Notes that the thread could not run for that long although there was something to do.
  void note_loss(int index, nanoseconds absent, Clock::time_point time) {
    const int64_t at = nanoseconds(time.time_since_epoch()).count();
    for (std::atomic<int64_t> *end : {contended_until, &member(index).contended_until}) {
      const int64_t before = std::max(at, end->load(std::memory_order_relaxed));
      const int64_t until =
          std::min(before + memory_of_losses * absent.count(), at + nanoseconds(longest_memory).count());
      end->store(until, std::memory_order_relaxed);
    }
  }

  // Whether a thread of the region has had its core to itself lately.
  bool some_undisturbed() const {
    for (int i = 0; i < limit.load(std::memory_order_relaxed); i++) {
      if (!is_ahead(member(i).contended_until)) return true;
    }
    return false;
  }

  // For a thread that has worked since it last looked: notes whether it will soon have to leave its core, and should
  // do so now because others could go on without it. Where all share their cores, it stays: the system switches all
  // cores at the same ticks of its clock, so that their turns fall together, which leaving early would undo.
  void look(int index) {
    Member &self = member(index);
    const auto time = Clock::now();
    if (time - self.seen < lost_core) {
      self.seen = time;
    } else {
      const nanoseconds had = self.seen - self.since, absent = mark(index, time);
      if (absent > lost_core) {
        note_loss(index, absent, time);
        const int64_t expected = turn.load(std::memory_order_relaxed);
        if (had.count() < expected) set_turn(std::max(expected * 9 / 10, had.count() * 7 / 8));
        self.since = time;
      }
    }
    self.turn_over =
        time - self.since > nanoseconds(turn.load(std::memory_order_relaxed)) && contended() && some_undisturbed();
  }

  void set_turn(int64_t time) {
    const int64_t least = nanoseconds(shortest_turn).count(), most = nanoseconds(longest_turn).count();
    turn.store(std::clamp(time, least, most), std::memory_order_relaxed);
  }

  // Lets other programs use the core. If one does, the thread has it back for a whole turn.
  void give_way(int index) {
    mark(index, Clock::now());
    std::this_thread::yield();
    const auto time = Clock::now();
    const nanoseconds absent = mark(index, time);
    member(index).since = time, member(index).turn_over = false;
    if (absent < lost_core) return;
    note_loss(index, absent, time);
    set_turn(turn.load(std::memory_order_relaxed) * 101 / 100);
  }

  // Makes the thread a member of the region's open team. False if the region has ended.
  bool join(uint64_t region, Roll *into) {
    uint64_t seen = roll.load();
    while (Roll(seen).region() == region && !Roll(seen).is_over()) {
      if (Roll(seen).full()) {
        seen = roll.load();  // the next phase is about to begin
        continue;
      }
      *into = Roll(seen).with_member();
      if (roll.compare_exchange_weak(seen, into->word())) return true;
    }
    return false;
  }

  // The thread has done its part of a phase. Returns when the next one begins, or, in an open team, with a later one if
  // it had to leave its core. False if the region is over.
  bool meet(int index, Roll *at) {
    spread(index);
    if (at->open() && member(index).turn_over) return leave(index, at);
    const Roll here(roll.fetch_add(Roll::arrival));
    if (here.last()) {
      *at = here.next_phase(last_phase);
      roll.store(at->word());  // nobody else changes it while all of the team have arrived
      wake_sleepers();
      look(index);
      return !at->is_over();
    }
    look(index);
    const Roll before = *at;
    wait_inside(index, [&] { return !now().same_phase(before); });
    *at = now();
    return at->region() == before.region() && !at->is_over();
  }

  void wake_sleepers() {
    if (sleepers.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    passed.notify_all();
  }

  // Arrives and leaves the team, gives way, and comes back.
  bool leave(int index, Roll *at) {
    uint64_t seen = roll.load();
    for (;;) {
      const bool last = Roll(seen).last();
      const Roll next = (last ? Roll(seen).next_phase(last_phase) : Roll(seen)).without_member();
      if (!roll.compare_exchange_weak(seen, next.word())) continue;
      if (last) wake_sleepers();
      break;
    }
    give_way(index);
    return join(at->region(), at);
  }

  // A thread's part of a region.
  void take_part(int index, Roll at) {
    spread(index);
    const auto time = Clock::now();
    Member &self = member(index);
    if (mark(index, time) > lost_core) self.since = time;
    if (!self.short_turns && contended()) prefer_short_turns(), self.short_turns = true;
    do {
      (*body)(index, static_cast<int>(at.phase()));
    } while (meet(index, &at));
  }

  void work(int index) {
    const DenormalsAreZero denormals;
    std::atomic<bool> &sleeping = member(index).asleep;
    bool spins = true;
    for (uint64_t seen = 0;;) {
      const auto called = [&] { return now().region() != seen; };
      if (!spins || !spin_until(called, Clock::now(), spin_between_regions, !contended())) {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping.store(true);
        wake.wait(lock, called);
        sleeping.store(false);
      }
      if (stop) return;
      Roll at = now();
      seen = at.region();
      spins =
          index < limit.load(std::memory_order_relaxed);  // a region without this thread is soon followed by another
      if (spins && (!at.open() || join(seen, &at))) take_part(index, at);
    }
  }

  std::unique_ptr<Member[]> members;  // by index
  std::unique_ptr<std::atomic<int>[]> cores;  // by index: where each thread ran when it last looked
  std::atomic<int64_t> *contended_until;
  std::vector<std::thread> workers;
  const std::function<void(int, int)> *body = nullptr;
  uint64_t last_phase = 0;  // the number of phases of the region
  std::atomic<int> limit{0};  // threads that the region may have
  std::atomic<uint64_t> roll{Roll().word()};
  std::atomic<int64_t> turn{nanoseconds(first_turn).count()};
  std::atomic<int> sleepers{0};  // that wait for a phase or a region to end
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake, passed;
};

Pool::Pool(int threads) : threads_(threads) {
  const int cores = std::min(usable_cores(), Roll::most_threads);
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
  crew_ = std::make_unique<Crew>(threads_, &contended_until_);
  process_ = getpid();
}

void Pool::run(int threads, int phases, Team team, const std::function<void(int, int)> &body) {
  std::lock_guard<std::mutex> lock(region_);
  const DenormalsAreZero denormals;
  if (threads_ > 1) {
    start();
    end_behind();
  }
  if (threads == 1) {
    for (int phase = 0; phase < phases; phase++) body(0, phase);
    return;
  }
  crew_->begin(threads, 1, phases, team, body);
  crew_->take_part(0, crew_->now());
  crew_->end();
}

void Pool::on_each(const std::function<void(int)> &body) {
  run(threads_, 1, Team::fixed, [&](int thread, int) { body(thread); });
}

void Pool::share(int threads, int phases, Team team, const std::function<void(int, int)> &body) {
  if (phases >= static_cast<int>(Roll::over)) {
    throw config_error("a region has " + std::to_string(phases) + " phases; fewer than " + std::to_string(Roll::over) +
                       " are possible");
  }
  if (phases > 0) run(threads, phases, team, body);
}

bool Pool::contended() const { return is_ahead(contended_until_); }

void Pool::run_behind(std::function<void(int)> body) {
  std::lock_guard<std::mutex> lock(region_);
  if (threads_ == 1) return;
  start();
  end_behind();
  behind_ = [work = std::move(body)](int thread, int) { work(thread); };
  crew_->begin(threads_, 0, 1, Team::open, behind_);
}

void Pool::interrupt() {
  std::lock_guard<std::mutex> lock(region_);
  if (process_ == getpid()) end_behind();  // a forked child has none of the threads
}

void Pool::end_behind() {
  if (!behind_) return;
  wanted_.store(true);
  crew_->end();
  wanted_.store(false);
  behind_ = nullptr;
}

void Pool::for_each(int64_t items, int64_t chunk,
                    const std::function<void(int64_t begin, int64_t end, int thread)> &body) {
  std::atomic<int64_t> next{0};
  share(threads_, 1, Team::open, [&](int thread, int) {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < items;) {
      body(begin, begin + chunk < items ? begin + chunk : items, thread);
    }
  });
}

std::shared_ptr<Pool> shared_pool(int threads) {
  static std::mutex mutex;
  static std::vector<std::shared_ptr<Pool>> pools;  // they live as long as the process: an engine may come back
  const int wanted = threads == 0 ? std::min(usable_cores(), Roll::most_threads) : threads;
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto &pool : pools) {
    if (pool->threads() == wanted) return pool;
  }
  pools.push_back(std::make_shared<Pool>(wanted));
  return pools.back();
}

}  // namespace mnemos
