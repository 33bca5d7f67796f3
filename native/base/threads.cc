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

// How long a thread polls before it sleeps: about 50 us, more than the gap between two ops of a model.
constexpr int kSpins = 2000;

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
  int parts;
  internal::RangeFunction run;
  void* context;

  void run_part(int part) const {
    const int64_t units = (n + grain - 1) / grain;
    const int64_t begin = units * part / parts * grain;
    const int64_t end = std::min(n, units * (part + 1) / parts * grain);
    if (begin < end) run(context, begin, end);
  }
};

thread_local bool inside = false;  // this thread is running a body

// Workers 1..size-1; the caller is number 0. Never destroyed: the workers sleep until the process ends, and after a
// fork the child forgets the parent's pool, whose threads it does not have.
class Pool {
 public:
  void run(const Job& job) {
    while (size_ < job.parts) std::thread(&Pool::work, this, size_++, ticket_.load()).detach();
    job_ = job;
    remaining_.store(job.parts - 1, std::memory_order_relaxed);
    ticket_.store(((ticket_.load(std::memory_order_relaxed) >> kPartBits) + 1) << kPartBits | uint64_t(job.parts),
                  std::memory_order_release);
    ticket_.notify_all();
    inside = true;
    job.run_part(0);
    inside = false;
    for (int left = remaining_.load(std::memory_order_acquire); left != 0;) left = wait_change(remaining_, left);
  }

  std::mutex mutex;  // held by the caller whose job runs

 private:
  static constexpr int kPartBits = 16;  // a ticket is job number << 16 | parts

  // A worker reads job_ only when the ticket gives it a part, and the caller waits for it before it writes job_ again.
  void work(int part, uint64_t ticket) {
    inside = true;
    for (;;) {
      ticket = wait_change(ticket_, ticket);
      if (part >= int(ticket & ((1u << kPartBits) - 1))) continue;
      job_.run_part(part);
      if (remaining_.fetch_sub(1, std::memory_order_acq_rel) == 1) remaining_.notify_one();
    }
  }

  Job job_{};
  alignas(64) std::atomic<uint64_t> ticket_{0};
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
  const int parts = int(std::min<int64_t>(threads(), (n + grain - 1) / grain));
  if (parts > 1 && !inside) {
    Pool& p = the_pool();
    if (std::unique_lock lock(p.mutex, std::try_to_lock); lock) return p.run({n, grain, parts, run, context});
  }
  run(context, 0, n);
}

}  // namespace internal
}  // namespace tersor
