#include "base/threads.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace tersor {
namespace {

// How long a thread polls before it sleeps: some 100 us, more than what lies between two tokens of a decoding model.
constexpr int kSpins = 6000;

// A loop is done in rounds of a part per thread: half of all, half of the rest, .. and in the last round all that is
// left, claimed one by one. So a thread that the system stops, or that comes late, leaves most of its work to the
// others, for a few claims, each of which takes the counter's cache line from the CPU that claimed before. The parts of
// a round are alike, but for the last: halves of odd numbers, shared unevenly, would leave threads without work at the
// end.
constexpr int kMostRounds = 5;

// Units of a round that is not the last: half of what is left, of which every thread can have two or more.
int64_t units_of_round(int64_t left, int threads) { return (left / threads + 1) / 2 * threads; }

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `value` differs from `old`: polls for a while, then sleeps.
template <typename T>
T wait_change(const std::atomic<T>& value, T old) {
  for (int i = 0; i < kSpins; ++i) {
    const T now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

struct Job {
  int64_t n, grain;
  int threads, rounds;
  internal::RangeFunction run;
  void* context;

  int parts() const { return threads * rounds; }

  void run_part(int part) const {
    const int round = part / threads, i = part % threads;
    int64_t first = 0, left = (n + grain - 1) / grain;
    for (int r = 0; r < round; ++r) {
      const int64_t done = units_of_round(left, threads);
      first += done;
      left -= done;
    }
    const int64_t length = round + 1 < rounds ? units_of_round(left, threads) : left;
    const int64_t begin = (first + length * i / threads) * grain;
    const int64_t end = std::min(n, (first + length * (i + 1) / threads) * grain);
    if (begin < end) run(context, begin, end);
  }
};

thread_local bool inside = false;  // this thread is running a body
thread_local bool alone = false;   // its loops run on it alone

// Workers 1..size-1; the caller is number 0. Never destroyed: the workers sleep until the process ends, and after a
// fork the child forgets the parent's pool, whose threads it does not have.
//
// Parts are claimed from claims_ = job number << 32 | next part. Before the fields of a job are written, claims_ gets
// its number with no part to claim; the parts open when all fields are there. So a worker of an earlier job that reads
// a new field (they are released and acquired) sees a number in claims_ that is not its own, and claims nothing.
class Pool {
 public:
  void run(const Job& job) {
    while (size_ < job.threads) std::thread(&Pool::work, this, size_++, ticket_.load()).detach();
    claims_.store(uint64_t(++number_) << 32 | kNoPart, std::memory_order_relaxed);
    n_.store(job.n, std::memory_order_release);
    grain_.store(job.grain, std::memory_order_release);
    rounds_.store(job.rounds, std::memory_order_release);
    run_.store(job.run, std::memory_order_release);
    context_.store(job.context, std::memory_order_release);
    remaining_.store(job.parts(), std::memory_order_relaxed);
    claims_.store(uint64_t(number_) << 32, std::memory_order_release);
    ticket_.store(uint64_t(number_) << kThreadBits | uint64_t(job.threads), std::memory_order_release);
    ticket_.notify_all();
    work_on(number_, job);
    for (int left = remaining_.load(std::memory_order_acquire); left != 0;) left = wait_change(remaining_, left);
  }

  std::mutex mutex;  // held by the caller whose job runs

 private:
  static constexpr uint32_t kNoPart = 0x7fffffff;  // more than any job has
  static constexpr int kThreadBits = 16;           // a ticket is job number << 16 | threads

  // Claims and runs parts of a job until there are none left.
  void work_on(uint32_t number, const Job& job) {
    inside = true;
    int done = 0;
    uint64_t claim = claims_.load(std::memory_order_acquire);
    while (uint32_t(claim >> 32) == number && int(uint32_t(claim)) < job.parts()) {
      if (!claims_.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      job.run_part(int(uint32_t(claim)));
      ++done;
      claim = claims_.load(std::memory_order_acquire);
    }
    if (done > 0 && remaining_.fetch_sub(done, std::memory_order_acq_rel) == done) remaining_.notify_one();
    inside = false;
  }

  void work(int worker, uint64_t ticket) {
    for (;;) {
      ticket = wait_change(ticket_, ticket);
      const int threads = int(ticket & ((1u << kThreadBits) - 1));
      if (worker >= threads) continue;
      const Job job = {n_.load(std::memory_order_acquire),
                       grain_.load(std::memory_order_acquire),
                       threads,
                       rounds_.load(std::memory_order_acquire),
                       run_.load(std::memory_order_acquire),
                       context_.load(std::memory_order_acquire)};
      work_on(uint32_t(ticket >> kThreadBits), job);
    }
  }

  std::atomic<int64_t> n_{0}, grain_{1};
  std::atomic<int> rounds_{0};
  std::atomic<internal::RangeFunction> run_{nullptr};
  std::atomic<void*> context_{nullptr};
  uint32_t number_ = 0;  // of the job, below 2^32; changed by the caller only
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint64_t> claims_{0};
  alignas(64) std::atomic<int> remaining_{0};
  int size_ = 1;
};

std::atomic<int> wanted{0};  // 0: not set yet
std::atomic<Pool*> pool{nullptr};

// CPUs that a container may use: "<microseconds> <period>" or "max <period>" (Linux cgroup v2, cpu.max), rounded up.
int quota() {
  long long budget = 0, period = 0;
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    if (std::fscanf(file, "%lld %lld", &budget, &period) != 2) budget = 0;
    std::fclose(file);
  }
  return budget > 0 && period > 0 ? int(std::min<long long>(kMaxThreads, (budget + period - 1) / period)) : kMaxThreads;
}

Pool& the_pool() {
  Pool* p = pool.load(std::memory_order_acquire);
  if (p) return *p;
  Pool* made = new Pool;
  if (pool.compare_exchange_strong(p, made)) {
#ifndef _WIN32
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
#endif
    return *made;
  }
  delete made;
  return *p;
}

}  // namespace

void run_alone(bool value) { alone = value; }

void set_threads(int n) { wanted.store(std::clamp(n, 1, kMaxThreads)); }

int threads() {
  int n = wanted.load(std::memory_order_relaxed);
  if (n == 0) {
    n = std::clamp(std::min(int(std::thread::hardware_concurrency()), quota()), 1, kMaxThreads);
    wanted.store(n);
  }
  return n;
}

namespace internal {

void parallel_run(int64_t n, int64_t grain, RangeFunction run, void* context) {
  if (n <= 0) return;
  const int64_t units = (n + grain - 1) / grain;
  const int workers = int(std::min<int64_t>(threads(), units));
  if (workers > 1 && !inside && !alone) {
    Pool& p = the_pool();
    if (std::unique_lock lock(p.mutex, std::try_to_lock); lock) {
      int rounds = 1;
      for (int64_t left = units; rounds < kMostRounds && left / workers >= 2; ++rounds)
        left -= units_of_round(left, workers);
      return p.run({n, grain, workers, rounds, run, context});
    }
  }
  run(context, 0, n);
}

}  // namespace internal
}  // namespace tersor
