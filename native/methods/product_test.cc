#include "methods/product.h"

#include <cmath>

#include "base/cpu.h"
#include "kernels/kernel_test.h"

namespace tersor::test {
namespace {

// Values of very different size in a row, so that what the smaller parts of a float hold counts.
std::vector<float> uneven(Random& random, int64_t n) {
  std::vector<float> values = random.bells(n);
  for (float& v : values) v *= std::ldexp(1.0f, random.below(12) - 6);
  return values;
}

// Lines lie 3 floats further apart than they are long; what lies between must stay.
void test_product(int64_t m, int64_t n, int64_t k, bool by_columns) {
  Random random(uint32_t(m * 31 + n * 7 + k));
  const int64_t a_line = (by_columns ? m : k) + 3, line = n + 3;
  const std::vector<float> a = uneven(random, a_line * (by_columns ? k : m)), b = uneven(random, line * k);
  const std::vector<float> before = uneven(random, line * m);
  Expected want;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < line; ++j) {
      double sum = 0, size = 0;
      for (int64_t l = 0; l < k && j < n; ++l) {
        const double term = double(a[by_columns ? l * a_line + i : i * a_line + l]) * b[l * line + j];
        sum += term, size += std::fabs(term);
      }
      const double old = j >= n ? before[i * line + j] : 0;
      // Six products a term, summed one by one, and the three that are left out.
      want.add(old + sum, j >= n ? 0 : (6 * double(k) + 8) * kRounding * size);
    }
  }
  const std::string what = "product " + std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k) +
                           (by_columns ? ", by columns" : "");
  std::vector<float> out = before;
  multiply(m, n, k, {a.data(), a_line, by_columns}, b.data(), line, out.data(), line);
  expect_near(what, out, want);
}

}  // namespace

void test_products() {
  for (const std::string& isa : isas()) {
    check(force_isa(isa).empty(), "force_isa " + isa);
    check(multiplies_by_tiles() == (isa == "amx"), isa + ": tiles");
    if (!multiplies_by_tiles()) continue;
    for (const bool by_columns : {false, true}) {
      for (const int64_t k : {0, 1, 2, 31, 32, 33, 545}) test_product(17, 35, k, by_columns);
      for (const int64_t m : {1, 15, 16, 32, 33, 530}) test_product(m, 16, 40, by_columns);
      for (const int64_t n : {1, 15, 32, 49, 530}) test_product(20, n, 40, by_columns);
    }
  }
}

}  // namespace tersor::test
