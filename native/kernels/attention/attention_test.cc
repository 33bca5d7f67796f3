#include "kernels/attention/attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/kernel_test.h"

namespace tersor::test {
namespace {

constexpr double kExp = 4, kTanh = 9;  // roundings of e^x and tanh (base/simd/math.h)

struct Shape {
  int heads, kv_heads, head_dim;
  int64_t before, n;  // positions in the cache, queries
  int64_t window;
  float softcap;
};

// softmax(scale q k^T) v for one query and head that sees keys [first, end).
//
// A score errs by head_dim + 2 roundings of the sum of its terms' magnitudes, with a cap by those of tanh too; a weight
// e^(score - largest) relatively by what its score and the largest one do, by one rounding of their difference, and by
// e^x. Each partial sum of 64 keys may be rescaled (6 roundings); 512 keys may be merged. An error e of the weights p
// moves the mean by sum p e |v - mean|.
void expect_head(const float* q, const float* keys, const float* values, int64_t stride, int64_t first, int64_t end,
                 float scale, const Shape& s, Expected& want) {
  std::vector<double> score, error, weight;
  double largest = -1e300, largest_error = 0, total = 0;
  for (int64_t j = first; j < end; ++j) {
    double sum = 0, magnitude = 0;
    for (int d = 0; d < s.head_dim; ++d) {
      const double term = double(q[d]) * double(scale) * double(keys[j * stride + d]);
      sum += term;
      magnitude += std::fabs(term);
    }
    double e = (s.head_dim + 2) * kRounding * magnitude;
    if (s.softcap > 0) {
      sum = double(s.softcap) * std::tanh(sum / double(s.softcap));
      e += (kTanh + 3) * kRounding * std::fabs(sum);
    }
    score.push_back(sum);
    error.push_back(e);
    largest = std::max(largest, sum);
    largest_error = std::max(largest_error, e);
  }
  for (size_t j = 0; j < score.size(); ++j) {
    weight.push_back(std::exp(score[j] - largest));
    error[j] += largest_error + kRounding * (kExp + largest - score[j]);
    total += weight[j];
  }
  const double roundings = 2 * double(score.size()) + 32;
  for (int d = 0; d < s.head_dim; ++d) {
    double mean = 0, magnitude = 0, moved = 0;
    for (size_t j = 0; j < score.size(); ++j)
      mean += weight[j] / total * double(values[(first + int64_t(j)) * stride + d]);
    for (size_t j = 0; j < score.size(); ++j) {
      const double v = double(values[(first + int64_t(j)) * stride + d]);
      magnitude += weight[j] / total * std::fabs(v);
      moved += weight[j] / total * error[j] * std::fabs(v - mean);
    }
    want.add(mean, moved + roundings * kRounding * magnitude);
  }
}

void test_shape(const Shape& s, Float type) {
  Random random{uint32_t(s.head_dim * 1000 + s.before * 10 + s.n)};
  const int64_t positions = s.before + s.n, stride = int64_t(s.kv_heads) * s.head_dim,
                query_stride = int64_t(s.heads) * s.head_dim + 3;
  std::vector<float> keys = random.bells(positions * stride), values = random.bells(positions * stride);
  const std::vector<float> queries = random.bells(s.n * query_stride);
  if (type == kF16) {
    for (float& x : keys) x = f16_to_f32(f32_to_f16(x));
    for (float& x : values) x = f16_to_f32(f32_to_f16(x));
  }
  const float scale = 1.5f / std::sqrt(float(s.head_dim));
  Expected want;
  for (int64_t i = 0; i < s.n; ++i) {
    const int64_t end = s.before + i + 1, first = s.window > 0 ? std::max<int64_t>(0, end - s.window) : 0;
    for (int h = 0; h < s.heads; ++h) {
      const int64_t at = int64_t(h / (s.heads / s.kv_heads)) * s.head_dim;
      expect_head(&queries[i * query_stride + int64_t(h) * s.head_dim], &keys[at], &values[at], stride, first, end,
                  scale, s, want);
    }
  }
  expect_everywhere(
      "attention, head_dim " + std::to_string(s.head_dim) + ", " + std::to_string(positions) + " keys",
      [&] {
        attention::Cache cache(2, s.kv_heads, s.head_dim, positions, type);
        // One by one at first, then the rest at once: positions within a panel and across panels.
        const int64_t single = std::min<int64_t>(s.before, 3);
        for (int64_t i = 0; i < single; ++i, ++cache.length)
          attention::append(cache, 1, {&keys[i * stride], 1, stride}, {&values[i * stride], 1, stride});
        attention::append(cache, 1, {keys.data() + single * stride, positions - single, stride},
                          {values.data() + single * stride, positions - single, stride});
        cache.length = s.before;
        Result out(s.n * s.heads * s.head_dim);
        attention::attend(cache, 1, {queries.data(), s.n, query_stride}, s.heads, scale, s.softcap, s.window,
                          out.data());
        return out;
      },
      want);
}

}  // namespace

void test_attention() {
  for (Float type : {kF32, kF16}) {
    for (int head_dim : {1, 8, 15, 16, 17, 24, 64, 80}) test_shape({2, 1, head_dim, 5, 3, 0, 0}, type);
    for (int64_t before : {0, 1, 14, 15, 16, 17, 63, 64, 65}) {
      test_shape({3, 3, 32, before, 1, 0, 0}, type);
      test_shape({6, 2, 32, before, 5, 0, 0}, type);
      test_shape({4, 1, 32, before, 18, 7, 2}, type);
    }
    test_shape({9, 3, 64, 0, 100, 0, 0}, type);
    test_shape({9, 3, 64, 1300, 1, 0, 0}, type);    // cut along the keys
    test_shape({40, 1, 16, 600, 2, 550, 5}, type);  // more heads of one key than a tile has rows
  }
}

}  // namespace tersor::test
