// One thread pool for the whole library, and the loop that runs on it.
//
//   parallel_for(rows, 16, [&](int64_t begin, int64_t end) { ... });
//
// The range is cut into contiguous parts whose borders are multiples of `grain`; threads() threads take one part after
// the other. A loop whose elements do not depend on each other therefore gives the same bits for any thread count. The
// body must not throw. A nested call, and a call while another caller holds the pool, run serially on the calling
// thread.
#pragma once

#include <cstdint>
#include <type_traits>

namespace tersor {

// Sets how many threads parallel_for uses, the caller included; 1 <= n <= kMaxThreads. Not to be called from a body.
void set_threads(int n);

// Threads in use; at first the number of CPUs that this process may run on (its affinity and its container's quota).
int threads();

inline constexpr int kMaxThreads = 1024;

// Says whether loops of the calling thread run on it alone: for callers that have a thread per CPU of their own.
void run_alone(bool alone);

namespace internal {
using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);
void parallel_run(int64_t n, int64_t grain, RangeFunction run, void* context);
}  // namespace internal

// Calls f(begin, end) for disjoint parts that cover [0, n). grain >= 1: the least useful work for one thread.
template <typename F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  using Body = std::remove_reference_t<F>;
  internal::parallel_run(
      n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
      const_cast<std::remove_const_t<Body>*>(&f));
}

}  // namespace tersor
