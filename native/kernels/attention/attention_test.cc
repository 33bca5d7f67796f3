#include "kernels/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/float16.h"
#include "base/threads.h"
#include "kernels/kernel_test.h"

namespace tersor::test {
namespace {

using attention::Type;

constexpr double kExp = 4, kTanh = 9;  // roundings of 2^x and tanh (base/simd/math.h)

struct Shape {
  int heads, kv_heads, head_dim;
  std::vector<std::pair<int64_t, int64_t>> sequences;  // positions in the cache, queries
  int64_t window;
  float softcap;
};

// A sequence's keys and values, (positions, kv_heads, head_dim), and as a cache holds them, (positions, kv_heads,
// width). An int8 cache rotates keys, and has a step for each value. `doubt`: how far off a key may be, a step where it
// lies so near the middle between two codes that the roundings of the rotation decide. `reach`: what a value is the sum
// of, in magnitude, and its codes at their largest.
struct Sequence {
  int64_t before, n;
  std::vector<float> keys, values, held_keys, held_values, key_doubt, value_step, key_reach, value_reach;
};

int width_of(int head_dim) { return (head_dim + 15) / 16 * 16; }

// The first head_dim of x, zeros up to width, times the Hadamard matrix of the largest power of two that divides width,
// block by block; divided by that power. x y = power * rotated(x) rotated(y).
std::vector<double> rotated(const float* x, int head_dim, double scale) {
  const int width = width_of(head_dim), power = width & -width;
  std::vector<double> y(width);
  for (int i = 0; i < width; ++i) {
    for (int j = i / power * power; j < std::min(head_dim, (i / power + 1) * power); ++j)
      y[i] += double(x[j]) * scale * (__builtin_parity(i % power & j % power) ? -1 : 1) / power;
  }
  return y;
}

// x, runs of head_dim, as the cache holds it: runs of width. Int8 has codes in [-127, 127] per group of values.
std::vector<float> held(const std::vector<float>& x, Type type, int head_dim, bool keys, std::vector<float>& steps,
                        std::vector<float>& doubt) {
  const int width = width_of(head_dim), group = keys ? attention::kKeyGroup : attention::value_group(type);
  std::vector<float> y;
  for (size_t run = 0; run < x.size(); run += head_dim) {
    std::vector<float> row(x.begin() + run, x.begin() + run + head_dim);
    row.resize(width);
    if (type == attention::kFloat16) {
      for (float& v : row) v = f16_to_f32(f32_to_f16(v));
    }
    if (type == attention::kInt8 && keys) {
      const std::vector<double> turned = rotated(&x[run], head_dim, width & -width);
      for (int d = 0; d < width; ++d) row[d] = float(turned[d]);
    }
    for (int first = 0; first < width; first += group) {
      const int end = std::min(width, first + group);
      float largest = 0;
      for (int d = first; d < end; ++d) largest = std::max(largest, std::fabs(row[d]));
      const float step = largest / 127.0f;
      for (int d = first; d < end; ++d) {
        const float code = row[d] / (step == 0 ? 1 : step), whole = std::nearbyint(code);
        if (type == attention::kInt8) row[d] = step * whole;
        steps.push_back(step);
        doubt.push_back(type == attention::kInt8 && std::fabs(code - whole) > 0.4995f ? step : 0);
      }
    }
    y.insert(y.end(), row.begin(), row.end());
  }
  return y;
}

float half(float x) { return f16_to_f32(f32_to_f16(x)); }

// x, positions of kv_heads runs of head_dim, as an int4 cache holds it: runs of width. Codes in [0, 15] times a float16
// scale plus a float16 minimum; keys rotated, less the first of 64, which is float16. x is a multiple of 1/8 and small,
// so that the rotation is exact and no doubt remains.
std::vector<float> held_nibbles(const std::vector<float>& x, int kv_heads, int head_dim, bool keys,
                                std::vector<float>& steps, std::vector<float>& reach) {
  const int width = width_of(head_dim), power = width & -width;
  float root = 4;
  while (4 * root * root <= float(power)) root *= 2;
  std::vector<float> y, anchors(kv_heads * width);
  for (size_t run = 0; run < x.size() / head_dim; ++run) {
    std::vector<float> row(x.begin() + run * head_dim, x.begin() + (run + 1) * head_dim);
    row.resize(width);
    float* anchor = &anchors[run % kv_heads * width];
    if (keys) {
      const std::vector<double> turned = rotated(&x[run * head_dim], head_dim, power);
      for (int d = 0; d < width; ++d) {
        row[d] = float(turned[d]) / root;
        if (run / kv_heads % 64 == 0) anchor[d] = half(row[d]);
        row[d] -= anchor[d];
      }
    }
    for (int first = 0; first < width; first += 32) {
      const int end = std::min(width, first + 32);
      const auto [low, high] = std::minmax_element(row.begin() + first, row.begin() + end);
      const float minimum = half(*low), step = half((*high - minimum) * (1.0f / 15));
      for (int d = first; d < end; ++d) {
        const float code = std::nearbyint((row[d] - minimum) / (step == 0 ? 1 : step));
        const float unit = keys ? root : 1;
        y.push_back(unit * (anchor[d] + (step * std::clamp(code, 0.0f, 15.0f) + minimum)));
        steps.push_back(unit * step);
        reach.push_back(unit * (std::fabs(anchor[d]) + std::fabs(minimum) + 15 * step));
      }
    }
  }
  return y;
}

// softmax(scale q k^T) v for one query and head that sees keys [first, end); `at` is where its head's values begin.
//
// A score errs by head_dim + 4 roundings of the sum of its terms' magnitudes, with a cap by those of tanh too; a weight
// 2^(score - largest) relatively by what its score and the largest one do, by one rounding of their difference, and by
// 2^x. The sums may be rescaled for each 64 keys (6 roundings). An error e of the weights p moves the mean by
// sum p e |v - mean|. With an int8 cache, queries are rotated (16 additions, then one for each doubling) and rounded to
// 16 bits per group of dimensions, and weights times the values' scales to 16 bits per 64 keys. Matrix tiles take
// queries and weights to 2^-15 and leave out 2^-16 of every product: kTileRoundings.
constexpr double kTileRoundings = 3 * 0x1p-16 / kRounding;

void expect_head(const float* query, const Sequence& sequence, int64_t stride, int64_t at, int64_t first, int64_t end,
                 float scale, const Shape& s, Type type, bool tiles, Expected& want) {
  const bool integer = attention::is_integer(type);
  std::vector<double> q, score, error, weight;
  for (int d = 0; d < s.head_dim; ++d) q.push_back(double(query[d]) * double(scale));
  double rotation = 0;  // the largest error of a rotated query's value, in roundings
  if (integer) {
    q = rotated(query, s.head_dim, double(scale));
    for (int d = 0; d < s.head_dim; ++d) rotation += std::fabs(double(query[d]) * double(scale));
    rotation *= 24.0 / (int(q.size()) & -int(q.size()));
  }
  double largest = -1e300, largest_error = 0, total = 0;
  for (int64_t j = first; j < end; ++j) {
    const float *key = &sequence.held_keys[j * stride + at], *doubt = &sequence.key_doubt[j * stride + at],
                *reach = &sequence.key_reach[j * stride + at];
    double sum = 0, e = 0;
    for (size_t d = 0; d < q.size(); ++d) {
      const double term = q[d] * double(key[d]);
      sum += term;
      e += kRounding *
           ((s.head_dim + (integer ? 30 : 4) + (tiles ? kTileRoundings : 0)) * std::fabs(q[d]) * double(reach[d]));
      if (!integer) continue;
      double top = 0;  // of the query's group, rounded to 32767 steps
      for (size_t i = d / attention::kKeyGroup * attention::kKeyGroup;
           i < std::min(q.size(), (d / attention::kKeyGroup + 1) * attention::kKeyGroup); ++i)
        top = std::max(top, std::fabs(q[i]));
      e += double(reach[d]) * (0.501 * top / 32767 + kRounding * rotation) + std::fabs(q[d]) * double(doubt[d]);
    }
    if (s.softcap > 0) {
      sum = double(s.softcap) * std::tanh(sum / double(s.softcap));
      e += (kTanh + 5) * kRounding * std::fabs(sum);
    }
    score.push_back(sum);
    error.push_back(e);
    largest = std::max(largest, sum);
    largest_error = std::max(largest_error, e);
  }
  for (size_t j = 0; j < score.size(); ++j) {
    weight.push_back(std::exp(score[j] - largest));
    error[j] += largest_error + kRounding * (kExp + 2 * (largest - score[j]));
    total += weight[j];
  }
  const double roundings = 2 * double(score.size()) + 32 + (tiles ? kTileRoundings : 0);
  for (int d = 0; d < s.head_dim; ++d) {
    double mean = 0, magnitude = 0, moved = 0, rounded = 0;
    const auto value = [&](size_t j) { return double(sequence.held_values[(first + int64_t(j)) * stride + at + d]); };
    for (size_t j = 0; j < score.size(); ++j) mean += weight[j] / total * value(j);
    for (size_t j = 0; j < score.size(); ++j) {
      magnitude += weight[j] / total * double(sequence.value_reach[(first + int64_t(j)) * stride + at + d]);
      moved += weight[j] / total * error[j] * std::fabs(value(j) - mean);
    }
    if (integer) {
      // The block of a key begins at a multiple of 64 positions.
      std::vector<double> top(end / 64 + 1), codes(end / 64 + 1);
      for (size_t j = 0; j < score.size(); ++j) {
        const int64_t position = first + int64_t(j), block = position / 64;
        const auto step = double(sequence.value_step[position * stride + at + d]);
        top[block] = std::max(top[block], weight[j] / total * step);
        codes[block] += type == attention::kInt4 ? 15 : step > 0 ? std::fabs(value(j)) / step : 0;
      }
      for (size_t b = 0; b < top.size(); ++b) rounded += 0.501 * top[b] / 32767 * codes[b];
    }
    want.add(mean, 1.01 * moved + rounded + roundings * kRounding * magnitude);
  }
}

std::unique_ptr<attention::Cache> filled(const Sequence& sequence, const Shape& s, Type type) {
  const int64_t positions = sequence.before + sequence.n, stride = int64_t(s.kv_heads) * s.head_dim;
  auto cache = std::make_unique<attention::Cache>(2, s.kv_heads, s.head_dim, positions, type);
  // One by one at first, then the rest at once: positions within a panel and across panels.
  const int64_t single = std::min<int64_t>(sequence.before, 3);
  for (int64_t i = 0; i < single; ++i, ++cache->length) {
    const attention::Span one[] = {{cache.get(), 0, 1}};
    attention::append(one, 1, {&sequence.keys[i * stride], 1, stride}, {&sequence.values[i * stride], 1, stride});
  }
  const attention::Span rest[] = {{cache.get(), 0, positions - single}};
  attention::append(rest, 1, {sequence.keys.data() + single * stride, positions - single, stride},
                    {sequence.values.data() + single * stride, positions - single, stride});
  cache->length = sequence.before;
  return cache;
}

void test_shape(const Shape& s, Type type) {
  const int64_t stride = int64_t(s.kv_heads) * s.head_dim, query_stride = int64_t(s.heads) * s.head_dim + 3,
                held_stride = int64_t(s.kv_heads) * width_of(s.head_dim);
  Random random{uint32_t(s.head_dim * 1000 + s.sequences[0].first * 10 + s.sequences[0].second)};
  const float scale = 1.5f / std::sqrt(float(s.head_dim));
  int64_t rows = 0;
  for (const auto& [before, n] : s.sequences) rows += n;
  const std::vector<float> queries = random.bells(rows * query_stride);
  std::vector<Sequence> sequences;
  Expected want, tiles;
  int64_t row = 0;
  for (const auto& [before, n] : s.sequences) {
    const int64_t count = (before + n) * stride;
    Sequence sequence{before, n, random.bells(count), random.bells(count), {}, {}, {}, {}, {}, {}};
    std::vector<float> unused;
    if (type == attention::kInt4) {
      for (auto* x : {&sequence.keys, &sequence.values}) {
        for (float& v : *x) v = std::nearbyint(8 * v) / 8;
      }
      sequence.held_keys = held_nibbles(sequence.keys, s.kv_heads, s.head_dim, true, unused, sequence.key_reach);
      sequence.held_values =
          held_nibbles(sequence.values, s.kv_heads, s.head_dim, false, sequence.value_step, sequence.value_reach);
      sequence.key_doubt.assign(sequence.held_keys.size(), 0);
    } else {
      sequence.held_keys = held(sequence.keys, type, s.head_dim, true, unused, sequence.key_doubt);
      sequence.held_values = held(sequence.values, type, s.head_dim, false, sequence.value_step, unused);
      for (float v : sequence.held_keys) sequence.key_reach.push_back(std::fabs(v));
      for (float v : sequence.held_values) sequence.value_reach.push_back(std::fabs(v));
    }
    for (int64_t i = 0; i < n; ++i, ++row) {
      const int64_t end = before + i + 1, first = s.window > 0 ? std::max<int64_t>(0, end - s.window) : 0;
      for (int h = 0; h < s.heads; ++h) {
        for (Expected* each : {&want, &tiles}) {
          const bool many = each == &tiles && type == attention::kFloat16 && n >= attention::kManyQueries;
          expect_head(&queries[row * query_stride + int64_t(h) * s.head_dim], sequence, held_stride,
                      int64_t(h / (s.heads / s.kv_heads)) * width_of(s.head_dim), first, end, scale, s, type, many,
                      *each);
        }
      }
    }
    sequences.push_back(std::move(sequence));
  }
  const auto attend = [&](bool together) {
    std::vector<std::unique_ptr<attention::Cache>> caches;
    std::vector<attention::Span> spans;
    Result out(rows * s.heads * s.head_dim);
    for (const Sequence& sequence : sequences) {
      const int64_t first = spans.empty() ? 0 : spans.back().row + spans.back().n;
      caches.push_back(filled(sequence, s, type));
      spans.push_back({caches.back().get(), first, sequence.n});
    }
    const attention::Rows q = {queries.data(), rows, query_stride};
    if (together) {
      attention::attend(spans, 1, q, s.heads, scale, s.softcap, s.window, out.data());
    } else {
      for (const attention::Span& span : spans)
        attention::attend({&span, 1}, 1, q, s.heads, scale, s.softcap, s.window, out.data());
    }
    return out;
  };
  const std::string what = "attention, head_dim " + std::to_string(s.head_dim) + ", type " + std::to_string(type);
  const std::vector<Result> results = expect_everywhere(
      what, [&] { return attend(true); },
      [&](const std::string& isa) -> const Expected& { return isa == "amx" ? tiles : want; });
  if (sequences.size() == 1) return;
  const Result alone = attend(false);  // the last instruction set of expect_everywhere is still in use
  check(!memcmp(alone.data(), results.back().data(), 4 * alone.size()), what + ": other bits beside other sequences");
}

}  // namespace

void test_attention() {
  for (Type type : {attention::kFloat32, attention::kFloat16, attention::kInt8, attention::kInt4}) {
    for (int head_dim : {1, 8, 15, 16, 17, 24, 33, 64, 80, 130}) test_shape({2, 1, head_dim, {{5, 3}}, 0, 0}, type);
    for (int64_t before : {0, 1, 14, 15, 16, 17, 63, 64, 65}) {
      test_shape({3, 3, 32, {{before, 1}}, 0, 0}, type);
      test_shape({6, 2, 32, {{before, 5}}, 0, 0}, type);
      test_shape({4, 1, 32, {{before, 18}}, 7, 2}, type);
    }
    for (int head_dim : {1, 16, 17, 33, 80, 130}) test_shape({2, 1, head_dim, {{70, 20}}, 0, 0}, type);
    test_shape({9, 3, 64, {{0, 100}}, 0, 0}, type);
    test_shape({2, 2, 64, {{200, 40}, {3, 2}, {0, 17}}, 50, 0}, type);
    test_shape({9, 3, 64, {{1300, 1}}, 0, 0}, type);     // cut along the keys
    test_shape({100, 1, 16, {{600, 2}}, 550, 5}, type);  // more heads of one key than a tile has rows
    test_shape({4, 2, 64, {{30, 1}, {0, 7}, {700, 1}, {65, 2}}, 0, 0}, type);
  }
}

}  // namespace tersor::test
