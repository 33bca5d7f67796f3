#include "kernels/plain_attention/plain_attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/kernel_test.h"

namespace tersor::test {
namespace {

constexpr double kExp = 4;  // roundings of 2^x (base/simd/math.h)

// One token of each sequence behind `length` others, in memory with room for two more, which is not to be read.
void test_shape(int64_t sequences, int64_t heads, int64_t kv_heads, int64_t d, int64_t length) {
  Random random{uint32_t(heads * 1000 + d * 10 + length)};
  const int64_t capacity = length + 3, share = heads / kv_heads;
  std::vector<float> keys = random.bells(sequences * kv_heads * capacity * d),
                     values = random.bells(int64_t(keys.size()));
  const std::vector<float> q = random.bells(sequences * heads * d), k = random.bells(sequences * kv_heads * d),
                           v = random.bells(sequences * kv_heads * d);
  const float scale = 1 / std::sqrt(float(d)), nan = std::nanf("");
  for (int64_t row = 0; row < sequences * kv_heads; ++row) {
    for (int64_t i = length * d; i < capacity * d; ++i)
      keys[row * capacity * d + i] = values[row * capacity * d + i] = nan;
  }
  std::vector<float> all_keys = keys, all_values = values;
  for (int64_t row = 0; row < sequences * kv_heads; ++row) {
    std::copy_n(&k[row * d], d, &all_keys[(row * capacity + length) * d]);
    std::copy_n(&v[row * d], d, &all_values[(row * capacity + length) * d]);
  }
  Expected want;
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t h = 0; h < heads; ++h) {
      const float* one = &q[(s * heads + h) * d];
      const int64_t at = (s * kv_heads + h / share) * capacity * d;
      std::vector<double> scores(length + 1);
      double reach = 0, total = 0;  // of the magnitudes that a score is the sum of
      for (int64_t p = 0; p <= length; ++p) {
        double magnitude = 0;
        for (int64_t i = 0; i < d; ++i) {
          const double product = double(one[i]) * double(all_keys[at + p * d + i]) * double(scale);
          scores[p] += product;
          magnitude += std::fabs(product);
        }
        reach = std::max(reach, magnitude);
      }
      const double top = *std::max_element(scores.begin(), scores.end());
      for (double& score : scores) total += score = std::exp(score - top);
      for (int64_t i = 0; i < d; ++i) {
        double sum = 0, magnitude = 0;
        for (int64_t p = 0; p <= length; ++p) {
          const double part = scores[p] / total * double(all_values[at + p * d + i]);
          sum += part;
          magnitude += std::fabs(part);
        }
        // a score errs by its products' and their sums' roundings, and once more as a power of two; so do weight and
        // total
        const double roundings = 2 * ((double(d) / 16 + 8) * (reach + 1) + kExp) + 2 * double(length + 1) + 4;
        want.add(sum, roundings * kRounding * magnitude);
      }
    }
  }
  expect_everywhere(
      "plain_attention " + std::to_string(heads) + " heads of " + std::to_string(d) + ", " + std::to_string(length),
      [&] {
        std::vector<float> mine_keys = keys, mine_values = values;
        const plain_attention::Memory memory{
            mine_keys.data(), mine_values.data(), sequences, kv_heads, capacity, d, length};
        Result out(sequences * heads * d);
        plain_attention::append(memory, k.data(), kv_heads * d, v.data(), kv_heads * d);
        plain_attention::attend(memory, q.data(), heads * d, heads, scale, out.data());
        return out;
      },
      want);
}

}  // namespace

void test_plain_attention() {
  for (int64_t length : {0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 300}) test_shape(1, 4, 2, 16, length);
  for (int64_t d = 2; d <= 34; d += 2) test_shape(2, 3, 1, d, 7);
  for (int64_t d : {62, 64, 66, 80, 96, 128, 130, 256}) test_shape(1, 2, 2, d, 9);
  test_shape(3, 9, 3, 64, 700);
}

}  // namespace tersor::test
