#include "kernels/elementwise/elementwise.h"

#include <cmath>

#include "kernels/kernel_test.h"

namespace tersor::test {
namespace {

// exp of base/simd/math.h errs by 2e-7 of its value, about 3.4 roundings; tanh by 5e-7, about 8.4.
constexpr double kExp = 4, kTanh = 9;

// The sum of d squares takes d / 16 additions per lane, then 4 over the lanes; the root halves its error.
void test_rms_norm(int64_t rows, int64_t d) {
  Random random{uint32_t(rows * 1000 + d)};
  const std::vector<float> x = random.bells(rows * d, 3), weight = random.bells(d);
  const float eps = 1e-5f;
  Expected want;
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0;
    for (int64_t k = 0; k < d; ++k) squares += double(x[i * d + k]) * x[i * d + k];
    const double factor = 1 / std::sqrt(squares / double(d) + double(eps));
    for (int64_t k = 0; k < d; ++k) {
      const double y = x[i * d + k] * factor * weight[k];
      want.add(y, (double(d) / 32 + 12) * kRounding * std::fabs(y));
    }
  }
  expect_everywhere(
      "rms_norm " + std::to_string(d),
      [&] {
        Result y(x);  // in place
        elementwise::rms_norm(y.data(), rows, d, weight.data(), eps, y.data());
        return y;
      },
      want);
}

// silu(x) = x / (1 + e^-x);  gelu(x) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3). An error of u by 6
// roundings is one of e^-2u by 12 |u|. e^x is at most e^88.37 > 2^127, where the results stop falling.
void test_gated(int64_t rows, int64_t f, elementwise::Activation activation) {
  Random random{uint32_t(rows * 1000 + f)};
  const std::vector<float> x = random.bells(rows * 2 * f, activation == elementwise::kSilu ? 40 : 6);
  Expected want;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < f; ++k) {
      const double g = x[i * 2 * f + k], up = x[i * 2 * f + f + k];
      const double u = 0.7978845608028654 * (g + 0.044715 * g * g * g);
      const double y = up * g / (1 + std::exp(activation == elementwise::kSilu ? -g : -2 * u));
      const double roundings = kExp + 4 + (activation == elementwise::kSilu ? 0 : 12 * std::fabs(u));
      want.add(y, roundings * kRounding * std::fabs(y) + 0x1p-127 * std::fabs(g * up));
    }
  }
  expect_everywhere(
      activation == elementwise::kSilu ? "silu" : "gelu",
      [&] {
        Result y(rows * f);
        elementwise::gated(x.data(), rows, f, activation, y.data());
        return y;
      },
      want);
}

void test_add_and_softcap(int64_t n) {
  Random random{uint32_t(n)};
  const std::vector<float> x = random.bells(n, 20), y = random.bells(n, 0.1f);
  const float cap = 30;
  Expected sums, capped;
  for (int64_t i = 0; i < n; ++i) {
    sums.add(double(x[i] + y[i]), 0);
    const double z = double(cap) * std::tanh(double(x[i]) / double(cap));
    capped.add(z, (kTanh + 3) * kRounding * std::fabs(z));
  }
  expect_everywhere(
      "add",
      [&] {
        Result z(x);
        elementwise::add(z.data(), y.data(), n);
        return z;
      },
      sums);
  expect_everywhere(
      "softcap",
      [&] {
        Result z(x);
        elementwise::softcap(z.data(), n, cap);
        return z;
      },
      capped);
}

// The pair (a, b) turns by the float32 angle; its cosine and sine are rounded, then two products and a sum.
void test_rope(int64_t n, int64_t heads, int64_t half, int64_t start) {
  Random random{uint32_t(n * 100 + half)};
  const int64_t width = heads * 2 * half, stride = width + 5;
  const std::vector<float> x = random.bells(n * stride);
  std::vector<float> inv_freq(half);
  for (int64_t j = 0; j < half; ++j) inv_freq[j] = float(std::pow(10000.0, -double(j) / double(half)));
  const float scale = 1.25f;
  Expected want;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < stride; ++k) {
      const double value = x[i * stride + k];
      if (k >= width) {  // between the rows: not touched
        want.add(value, 0);
        continue;
      }
      const int64_t j = k % half;
      const bool first = k / half % 2 == 0;
      const double other = x[i * stride + (first ? k + half : k - half)];
      const double angle = double(float(start + i) * inv_freq[j]);
      const double c = std::cos(angle) * double(scale), s = std::sin(angle) * double(scale);
      want.add(value * c + (first ? -other : other) * s, 4 * kRounding * (std::fabs(value * c) + std::fabs(other * s)));
    }
  }
  expect_everywhere(
      "rope",
      [&] {
        Result y(x);
        elementwise::rope_from(y.data(), n, stride, heads, half, start, inv_freq.data(), scale);
        return y;
      },
      want);
}

}  // namespace

void test_elementwise() {
  for (int64_t d = 1; d <= 40; ++d) test_rms_norm(3, d);
  test_rms_norm(100, 577);
  for (auto activation : {elementwise::kSilu, elementwise::kGeluTanh}) {
    for (int64_t f = 1; f <= 40; ++f) test_gated(3, f, activation);
    test_gated(5, 9001, activation);
  }
  for (int64_t n = 1; n <= 40; ++n) test_add_and_softcap(n);
  test_add_and_softcap(70001);
  for (int64_t half : {1, 4, 15, 16, 17, 40}) test_rope(5, 3, half, 7);
  test_rope(70, 9, 32, 1000);
}

}  // namespace tersor::test
