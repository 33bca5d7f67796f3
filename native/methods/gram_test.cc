#include "methods/gram.h"

#include <cmath>

#include "base/cpu.h"
#include "base/threads.h"
#include "kernels/kernel_test.h"

namespace tersor::test {
namespace {

// Values of very different size, so that what the smaller parts of a float hold counts.
std::vector<float> uneven(Random& random, int64_t n) {
  std::vector<float> values = random.bells(n);
  for (float& v : values) v *= std::ldexp(1.0f, random.below(12) - 6);
  return values;
}

void test_sizes(int64_t rows, int64_t columns) {
  Random random(uint32_t(rows * 31 + columns));
  const std::vector<float> x = uneven(random, rows * columns), before = uneven(random, columns * columns);
  Expected want;
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = before[i * columns + j], size = std::fabs(sum);
      for (int64_t row = 0; row < rows; ++row) {
        const double term = double(x[row * columns + i]) * x[row * columns + j];
        sum += term, size += std::fabs(term);
      }
      // Six products a term, summed one by one, the three that are left out, and the rounding of the result here.
      want.add(sum, (6 * std::min<double>(1024, double(rows)) + 8) * kRounding * size);
    }
  }
  // The same matrix as weights of the products: tr(X H X^T), by the same bounds.
  std::vector<double> weights(columns * columns);
  double trace = 0, bound = 0;
  size_t at = 0;
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t j = 0; j <= i; ++j, ++at) {
      const double old = before[i * columns + j], times = (i == j ? 1 : 2) * old;
      weights[i * columns + j] = old;
      trace += times * (want.value[at] - old), bound += std::fabs(times) * want.bound[at];
    }
  }
  Result first;
  double first_trace = 0;
  for (int n = 1; n <= 3; ++n) {
    set_threads(n);
    std::vector<double> gram(before.begin(), before.end());
    add_gram(rows, columns, x.data(), gram.data());
    Result got;
    for (int64_t i = 0; i < columns; ++i)
      got.insert(got.end(), gram.begin() + i * columns, gram.begin() + i * columns + i + 1);
    const std::string what = "gram of " + std::to_string(rows) + " x " + std::to_string(columns);
    expect_near(what, got, want);
    const double got_trace = gram_product(rows, columns, x.data(), weights.data());
    check(std::fabs(got_trace - trace) <= bound,
          what + ": trace " + std::to_string(got_trace) + ", need " + std::to_string(trace));
    if (n == 1) first = got, first_trace = got_trace;
    check(got_trace == first_trace, what + ": another trace on " + std::to_string(n) + " threads");
    check(got == first, what + ": other bits on " + std::to_string(n) + " threads");
  }
}

}  // namespace

void test_grams() {
  for (const std::string& isa : isas()) {
    check(force_isa(isa).empty(), "force_isa " + isa);
    check(multiplies_by_tiles() == (isa == "amx"), isa + ": tiles");
    if (!multiplies_by_tiles()) continue;
    for (const int64_t rows : {1, 2, 31, 32, 33, 512, 545, 1100}) test_sizes(rows, 35);
    for (const int64_t columns : {1, 15, 16, 32, 33, 64, 255, 256, 289, 530}) test_sizes(40, columns);
  }
}

}  // namespace tersor::test
