// Whole arrays of floats against the definition of the formats and sums in float64, for all lengths up to some vectors.
#include "formats/floats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/kernel_test.h"

namespace tersor::test {
namespace {

using Bytes = std::vector<uint8_t>;
using Widen = void(const uint16_t*, int64_t, float*);

Bytes bytes_of(const void* data, size_t n) {
  const auto* first = static_cast<const uint8_t*>(data);
  return {first, first + n};
}

// The bits of the float32 of the same value; a NaN keeps its payload. sign 1 | exponent | fraction.
uint32_t float32_bits(uint32_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, special = (1 << exponent_bits) - 1, bias = special / 2;
  const uint32_t fraction = bits & ((1u << fraction_bits) - 1), sign = bits >> 15;
  const int exponent = int(bits >> fraction_bits) & special;
  if (exponent == special) return sign << 31 | 0x7f800000 | fraction << (23 - fraction_bits);
  const double value = std::ldexp(double(exponent == 0 ? fraction : fraction + (1u << fraction_bits)),
                                  std::max(exponent, 1) - bias - fraction_bits);
  const float wide = float(sign ? -value : value);
  uint32_t result;
  std::memcpy(&result, &wide, 4);
  return result;
}

void test_widen(const char* what, Widen widen, int exponent_bits) {
  constexpr int64_t kAll = 1 << 16, kOdd = 3;  // all values and a ragged end
  std::vector<uint16_t> values;
  std::vector<uint32_t> want;
  for (int64_t i = 0; i < kAll + kOdd; ++i) {
    values.push_back(uint16_t(i));
    want.push_back(float32_bits(values.back(), exponent_bits));
  }
  const auto widened = [&](int64_t first, int64_t n) {
    std::vector<float> wide(size_t(n + 1), -7.f);
    widen(values.data() + first, n, wide.data());
    check(wide.back() == -7.f, std::string(what) + " wrote beyond the end");
    return bytes_of(wide.data(), 4 * size_t(n));
  };
  const Bytes all = expect_same_bytes(what, [&] { return widened(0, kAll + kOdd); });
  check(all == bytes_of(want.data(), all.size()), what);
  for (int64_t n = 0; n <= 40; ++n)
    check(widened(0x7be1, n) == bytes_of(want.data() + 0x7be1, 4 * size_t(n)), std::string(what) + " of few");
}

// Every float16, and what lies between it and the next: just below, at and just above the middle, where ties go to the
// even one.
void test_narrow() {
  std::vector<float> values;
  std::vector<uint16_t> want;
  const auto add = [&](double x, uint32_t half, uint32_t sign) {
    values.push_back(float(sign ? -x : x));
    want.push_back(uint16_t(half | sign << 15));
  };
  const auto value = [](uint32_t half) {
    const uint32_t bits = float32_bits(half, 5);
    float wide;
    std::memcpy(&wide, &bits, 4);
    return double(wide);
  };
  for (uint32_t sign = 0; sign < 2; ++sign)
    for (uint32_t half = 0; half < 0x7c00; ++half) {
      const double low = value(half), high = half == 0x7bff ? 65536 : value(half + 1), middle = (low + high) / 2;
      add(low, half, sign);
      add(std::nextafter(float(middle), 0.f), half, sign);
      add(middle, half + (half & 1), sign);
      add(std::nextafter(float(middle), 1e9f), half + 1, sign);
    }
  add(std::numeric_limits<double>::infinity(), 0x7c00, 1);
  add(1e30, 0x7c00, 0);
  values.push_back(std::numeric_limits<float>::quiet_NaN());
  want.push_back(0x7e00);
  const auto narrowed = [&](int64_t first, int64_t n) {
    std::vector<uint16_t> halves(size_t(n + 1), 7);
    narrow_f16(values.data() + first, n, halves.data());
    check(halves.back() == 7, "narrow_f16 wrote beyond the end");
    return bytes_of(halves.data(), 2 * size_t(n));
  };
  const Bytes all = expect_same_bytes("narrow_f16", [&] { return narrowed(0, int64_t(values.size())); });
  check(all == bytes_of(want.data(), all.size()), "narrow_f16");
  for (int64_t n = 0; n <= 40; ++n)
    check(narrowed(4090, n) == bytes_of(want.data() + 4090, 2 * size_t(n)), "narrow_f16 of few");
}

float largest(const std::vector<float>& w) {
  float result = 0;
  expect_same_bytes("largest_magnitude", [&] {
    result = largest_magnitude(w.data(), int64_t(w.size()));
    return bytes_of(&result, 4);
  });
  return result;
}

// The value at every place of arrays of every length.
void test_largest() {
  Random random{7};
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  check(largest({}) == 0 && largest({-0.f}) == 0, "largest_magnitude of nothing");
  for (int n = 1; n <= 40; ++n)
    for (int at = 0; at < n; ++at) {
      std::vector<float> w = random.bells(n);
      for (const float top : {-9.f, 9.f, -kInfinity, kInfinity}) {
        w[size_t(at)] = top;
        check(largest_magnitude(w.data(), n) == std::fabs(top), "largest_magnitude");
      }
      w[size_t(n - 1 - at)] = -std::numeric_limits<float>::quiet_NaN();
      check(std::isnan(largest_magnitude(w.data(), n)), "largest_magnitude of NaN");
    }
  std::vector<float> many(200'001, 0x1p-149f);
  check(largest(many) == 0x1p-149f, "largest_magnitude of subnormals");
  many[150'000] = -3;
  check(largest(many) == 3, "largest_magnitude of many");
  many[199'999] = std::numeric_limits<float>::signaling_NaN();
  check(std::isnan(largest(many)), "largest_magnitude of a NaN among many");
}

// A difference, a square and at most 16 + 8 + 1 additions in float32 of a part of 256 values.
void test_square_sums(int64_t n) {
  constexpr double kBound = 30 * kRounding;
  Random random{uint32_t(n)};
  const std::vector<float> w = random.bells(n, 0.02f), noise = random.bells(n, 0.001f);
  std::vector<float> decoded(w);
  double square = 0, error = 0;
  for (int64_t i = 0; i < n; ++i) {
    decoded[i] += noise[i];
    square += double(w[i]) * w[i];
    error += std::pow(double(decoded[i]) - w[i], 2);
  }
  SquareSums sums = {0, 0};
  expect_same_bytes("square_sums", [&] {
    sums = square_sums(w.data(), decoded.data(), n);
    return bytes_of(&sums, sizeof sums);
  });
  check(std::fabs(sums.w - square) <= kBound * square, "square_sums: w");
  check(std::fabs(sums.error - error) <= kBound * error, "square_sums: error");
  check(square_sums(w.data(), w.data(), n).error == 0, "square_sums of the same");
}

}  // namespace

void test_float_arrays() {
  test_widen("widen_f16", widen_f16, 5);
  test_widen("widen_bf16", widen_bf16, 8);
  test_narrow();
  test_largest();
  for (int64_t n = 0; n <= 40; ++n) test_square_sums(n);
  for (int64_t n : {255, 256, 257, 1000, 32'767, 32'768, 32'769, 200'001}) test_square_sums(n);
}

}  // namespace tersor::test
