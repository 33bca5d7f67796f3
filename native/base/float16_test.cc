// float16 and bfloat16, all values of them, in plain C++ and as the kernels of every instruction set convert them.
#include "base/float16.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/attention/attention.h"
#include "kernels/kernel_test.h"
#include "kernels/linear/pack.h"

namespace tersor::test {
namespace {

constexpr int kAll = 1 << 16;

// sign 1 | exponent | fraction, by the definition (IEEE 754-2008, 3.4), in float64.
double decode(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, exponent = int(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = std::ldexp(double(bits & ((1u << fraction_bits) - 1)), -fraction_bits);
  const double sign = bits >> (exponent_bits + fraction_bits) & 1 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction > 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias));
}

// y = 1 * w for a weight of one column whose rows are all values of the type.
void test_loads(Float type, int exponent_bits, int fraction_bits) {
  std::vector<uint16_t> all(kAll);
  Expected want;
  for (int i = 0; i < kAll; ++i) {
    all[i] = uint16_t(i);
    want.add(decode(uint32_t(i), exponent_bits, fraction_bits), 0);
  }
  expect_everywhere(
      type == kF16 ? "float16 loads" : "bfloat16 loads",
      [&] {
        linear::Weight weight;
        weight.rows = kAll;
        weight.columns = 1;
        weight.parts.push_back(linear::pack_floats(type, {{{reinterpret_cast<const uint8_t*>(all.data())}, kAll}}, 1));
        const float one = 1;
        Result y(kAll);
        linear::multiply(&one, 1, weight, nullptr, y.data());
        return y;
      },
      want);
}

// The same of E4M3, every value but its NaN; row r has the scale 2^r.
void test_e4m3_loads() {
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  Expected want;
  for (int i = 0; i < 256; ++i) {
    const int exponent = i >> 3 & 15, fraction = i & 7;
    if (exponent == 15 && fraction == 7) continue;
    const double value = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
    const int power = int(codes.size()) % 20;
    codes.push_back(uint8_t(i));
    scales.push_back(std::ldexp(1.0f, power));
    check(double(e4m3_to_f32(uint8_t(i))) == (i & 0x80 ? -value : value), "e4m3_to_f32");
    want.add(std::ldexp(i & 0x80 ? -value : value, power), 0);
  }
  expect_everywhere(
      "E4M3 loads",
      [&] {
        const auto rows = int64_t(codes.size());
        linear::Weight weight;
        weight.rows = rows;
        weight.columns = 1;
        weight.parts.push_back(
            linear::pack_floats(kE4M3, {{{codes.data(), reinterpret_cast<const uint8_t*>(scales.data())}, rows}}, 1));
        const float one = 1;
        Result y(rows);
        linear::multiply(&one, 1, weight, nullptr, y.data());
        return y;
      },
      want);
}

// Around every float16: itself, the value midway to the next, and the float32 on either side of that.
std::vector<float> hard_values() {
  std::vector<float> v;
  for (int i = 0; i < 0x7c00; ++i) {
    const float low = f16_to_f32(uint16_t(i)), high = i == 0x7bff ? 65536.0f : f16_to_f32(uint16_t(i + 1));
    const float middle = low + (high - low) / 2;
    for (float x : {low, std::nextafter(middle, low), middle, std::nextafter(middle, high)}) {
      v.push_back(x);
      v.push_back(-x);
    }
  }
  return v;
}

// The nearest float16, of two equally near ones the even one; found by search.
double nearest(float x) {
  int low = 0, high = 0x7c00;  // magnitudes; 0x7c00 stands for 65536, beyond which is infinity
  const double a = std::fabs(double(x));
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (decode(uint32_t(middle), 5, 10) <= a ? low : high) = middle;
  }
  const double below = decode(uint32_t(low), 5, 10), above = high == 0x7c00 ? 65536 : decode(uint32_t(high), 5, 10);
  const bool up = a - below > above - a || (a - below == above - a && low % 2 == 1);
  return std::copysign(!up ? below : high == 0x7c00 ? std::numeric_limits<double>::infinity() : above, x);
}

// Attention to one key gives its value, as the cache holds it.
void test_stores() {
  const int head_dim = 128;
  std::vector<float> values = hard_values();
  values.resize((values.size() + head_dim - 1) / head_dim * head_dim);
  const int heads = int(values.size()) / head_dim;
  const std::vector<float> nothing(values.size());
  Expected want;
  for (float x : values) {
    check(double(f16_to_f32(f32_to_f16(x))) == nearest(x), "f32_to_f16");
    // infinity times the weight 0 of the padding keys would be NaN; the others are exact
    want.add(nearest(x), 0);
  }
  expect_everywhere(
      "float16 stores",
      [&] {
        attention::Cache cache(1, heads, head_dim, 1, attention::kFloat16);
        const attention::Span span = {&cache, 0, 1};
        attention::append({&span, 1}, 0, {nothing.data(), 1, 0}, {values.data(), 1, 0});
        Result out(values.size());
        attention::attend({&span, 1}, 0, {nothing.data(), 1, 0}, heads, 1, 0, 0, out.data());
        return out;
      },
      want);
}

}  // namespace

void test_float16() {
  for (int i = 0; i < kAll; ++i) {
    const double want = decode(uint32_t(i), 5, 10), got = double(f16_to_f32(uint16_t(i)));
    check(std::isnan(want) ? std::isnan(got) : got == want, "f16_to_f32");
    check(std::isnan(want) || f32_to_f16(float(want)) == i, "f32_to_f16 of a float16");
    const double brain = decode(uint32_t(i), 8, 7), got_brain = double(bf16_to_f32(uint16_t(i)));
    check(std::isnan(brain) ? std::isnan(got_brain) : got_brain == brain, "bf16_to_f32");
  }
  test_loads(kF16, 5, 10);
  test_loads(kBF16, 8, 7);
  test_e4m3_loads();
  test_stores();
}

}  // namespace tersor::test
