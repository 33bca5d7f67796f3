// How the *_bench.cc programs time: CPU time per thread, the least of several rounds, so that other work on the machine
// disturbs little.
#pragma once

#include <algorithm>
#include <ctime>
#include <functional>

#include "base/threads.h"

namespace tersor {

inline double cpu_now() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Seconds of one call of f, after one that warms up.
inline double cpu_seconds(const std::function<void()>& f) {
  constexpr int kRounds = 7;
  constexpr double kRound = 0.02;  // seconds at least, of the whole process
  f();
  double best = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    int calls = 0;
    const double start = cpu_now();
    double end;
    do {
      f();
      ++calls;
      end = cpu_now();
    } while (end - start < kRound);
    best = std::min(best, (end - start) / calls);
  }
  return best / threads();
}

}  // namespace tersor
