#include "base/threads.h"

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "kernels/kernel_test.h"

namespace tersor::test {
namespace {

// Every index is visited once, in parts that start at multiples of the grain, by at most `threads` threads.
void test_cover(int64_t n, int64_t grain, int threads) {
  const std::string what =
      "parallel_for of " + std::to_string(n) + " by " + std::to_string(grain) + " on " + std::to_string(threads);
  set_threads(threads);
  std::vector<int> visits(n);  // disjoint parts: a race here is a bug that the thread sanitizer finds
  std::mutex mutex;
  std::set<std::thread::id> workers;
  bool aligned = true;
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++visits[i];
    const std::lock_guard lock(mutex);
    workers.insert(std::this_thread::get_id());
    aligned &= begin % grain == 0 && begin < end && (end % grain == 0 || end == n);
  });
  check(std::vector<int>(n, 1) == visits, what + ": not every index once");
  check(aligned, what + ": borders");
  check(int(workers.size()) <= threads && workers.empty() == (n == 0), what + ": threads");
}

// Where every thread can have as many units, there are as many parts of each size as threads, or a multiple.
void test_even(int64_t units_each, int threads) {
  set_threads(threads);
  std::mutex mutex;
  std::map<int64_t, int> parts;  // by their size
  parallel_for(units_each * threads, 1, [&](int64_t begin, int64_t end) {
    const std::lock_guard lock(mutex);
    ++parts[end - begin];
  });
  for (const auto& [size, count] : parts) {
    const std::string what = std::to_string(count) + " parts of " + std::to_string(size);
    check(count % threads == 0,
          what + " on " + std::to_string(threads) + " threads, each to have " + std::to_string(units_each));
  }
}

int64_t sum_of_squares(int64_t n) {
  std::atomic<int64_t> total{0};
  parallel_for(n, 8, [&](int64_t begin, int64_t end) {
    int64_t sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += i * i;
    total += sum;
  });
  return total;
}

// Calls from several threads at once: one has the pool, the others run alone.
void test_callers() {
  set_threads(3);
  const int64_t n = 1000, want = (n - 1) * n * (2 * n - 1) / 6;
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      for (int i = 0; i < 100; ++i) wrong += sum_of_squares(n) != want;
    });
  }
  for (std::thread& caller : callers) caller.join();
  check(wrong == 0, "parallel_for from several threads");
}

void test_nested() {
  set_threads(3);
  std::vector<int64_t> sums(20);
  parallel_for(20, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = sum_of_squares(i);
  });
  for (int64_t i = 0; i < 20; ++i) check(sums[i] == (i - 1) * i * (2 * i - 1) / 6, "nested parallel_for");
}

// Short and long loops in turn on more threads than CPUs: workers wake late, when the next loop begins.
void test_turns() {
  set_threads(8);
  std::vector<int> few(8), many(4096);
  for (int turn = 1; turn <= 10000; ++turn) {
    for (std::vector<int>* visits : {&few, &many}) {
      parallel_for(int64_t(visits->size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++(*visits)[i];
      });
    }
    if (few[7] != turn || many[4095] != turn) return check(false, "a loop returned before its end");
  }
  check(few == std::vector<int>(8, 10000) && many == std::vector<int>(4096, 10000), "loops in turn: not once each");
}

}  // namespace

void test_threads() {
  for (int threads : {1, 2, 3, 5, 2}) {
    for (int64_t n : {0, 1, 2, 3, 7, 16, 33, 1000}) {
      for (int64_t grain : {1, 3, 16, 2000}) test_cover(n, grain, threads);
    }
    for (int64_t units : {1, 2, 3, 5, 6, 7, 50}) test_even(units, threads);
  }
  test_callers();
  test_turns();
  test_nested();
}

}  // namespace tersor::test
