// Compares every AVX-512 kernel with its scalar one on random data, with the intrinsics emulated by SIMDe, so that any
// CPU can run it. Built and run by tests/unit/test_emulated_avx512.py. Exit code 1 and one line for each mismatch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "base/float16.h"
#include "kernels/attention/kernels.h"
#include "kernels/elementwise/kernels.h"
#include "kernels/linear/kernels.h"
#include "kernels/logits/kernels.h"

using namespace tersor;

namespace {

std::mt19937 generator(1);
int checks = 0, failures = 0;

std::vector<float> normal(size_t n, float scale = 1) {
  std::normal_distribution<float> distribution(0, scale);
  std::vector<float> v(n);
  for (float& x : v) x = distribution(generator);
  return v;
}

// A fused multiply-add rounds once where the scalar code rounds twice: `terms` such differences of 2^-24 of the largest
// value.
void expect_close(const char* what, const std::vector<float>& got, const std::vector<float>& want, double terms) {
  double largest = 0, error = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    largest = std::fmax(largest, std::fabs(want[i]));
    error = std::fmax(error, std::fabs(double(got[i]) - want[i]));
    if (std::isnan(got[i]) != std::isnan(want[i])) error = INFINITY;
  }
  ++checks;
  if (error > terms * std::ldexp(largest, -24)) {
    ++failures;
    std::printf("%s: error %g of %g\n", what, error, largest);
  }
}

void test_integer(linear::Code code, int group, linear::Second second) {
  const auto kernel = linear::avx512vnni_kernels.integer[code][group == 32][second];
  const auto reference = linear::scalar_kernels.integer[code][group == 32][second];
  static const int8_t kTable[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  for (int n : {1, 2, 3, 4, 5, 7, 8, 9, 17, 33}) {
    const int64_t groups = 2 * (1 + n % 3), columns = groups * group, groups32 = columns / 32;
    const int block = linear::block_bytes(code, group, second), rows = n == 5 ? 3 : 16;
    std::vector<uint8_t> blocks(groups * block);
    for (uint8_t& b : blocks) b = generator() & (code == linear::kU6 ? 63 : 255);
    for (int64_t g = 0; g < groups; ++g) {
      auto* halves = reinterpret_cast<uint16_t*>(&blocks[g * block + linear::code_bytes(code) * group]);
      const int count = second == linear::kNone ? 16 : 32;
      for (int i = 0; i < count; ++i) halves[i] = f32_to_f16(normal(1)[0]);
    }
    const std::vector<float> x = normal(n * columns);
    std::vector<int8_t> codes(n * columns);
    std::vector<float> scale(n * groups32), sums16(n * groups32 * 2), sums32(n * groups32);
    for (int i = 0; i < n; ++i) {
      linear::avx512vnni_kernels.quantize(&x[i * columns], columns, &codes[i * columns], &scale[i * groups32],
                                          &sums16[i * groups32 * 2], &sums32[i * groups32]);
    }
    const linear::Activations activations = {codes.data(), scale.data(), {sums16.data(), sums32.data()}, groups32};
    const std::vector<float> row_scale = normal(16), bias = normal(16), residual = normal(n * 20);
    std::vector<float> got(n * 20, 7.0f), want(n * 20, 7.0f);
    linear::Finish finish = {row_scale.data(), bias.data(), residual.data(), got.data(), 20, rows};
    const bool is_signed = code == linear::kS8 || code == linear::kT4;
    const linear::IntegerPanel panel = {blocks.data(), groups, is_signed && second == linear::kNone ? 0.0f : -8.0f,
                                        kTable};
    kernel(panel, activations, n, finish);
    finish.y = want.data();
    reference(panel, activations, n, finish);
    expect_close("integer", got, want, 64);
  }
}

void test_quantize() {
  for (int64_t k = 1; k <= 100; ++k) {
    const std::vector<float> x = normal(k);
    const int64_t groups = (k + 31) / 32;
    std::vector<int8_t> codes[2];
    std::vector<float> floats[2];
    for (int which = 0; which < 2; ++which) {
      codes[which].resize(groups * 32);
      floats[which].resize(groups * 4);
      float* f = floats[which].data();
      (which ? linear::scalar_kernels : linear::avx512vnni_kernels)
          .quantize(x.data(), k, codes[which].data(), f, f + groups, f + 3 * groups);
    }
    expect_close("quantize", floats[0], floats[1], 0);
    failures += codes[0] != codes[1];
  }
}

void test_floats(Float type) {
  for (int n : {1, 2, 3, 5, 8, 12, 13, 40}) {
    const int64_t k = 20 * n + 7;
    const std::vector<float> w = normal(k * 16), x = normal(n * k), row_scale = normal(16);
    std::vector<uint16_t> halves(w.size());
    for (size_t i = 0; i < w.size(); ++i)
      halves[i] = type == kF16 ? f32_to_f16(w[i]) : uint16_t(float_to_bits(w[i]) >> 16);
    const void* panel = type == kF32 ? static_cast<const void*>(w.data()) : halves.data();
    std::vector<float> got(n * 16), want(n * 16);
    linear::avx512vnni_kernels.floating[type](panel, k, x.data(), k, n,
                                              {row_scale.data(), nullptr, nullptr, got.data(), 16, 16});
    linear::scalar_kernels.floating[type](panel, k, x.data(), k, n,
                                          {row_scale.data(), nullptr, nullptr, want.data(), 16, 16});
    expect_close("floats", got, want, double(k));
  }
}

void test_elementwise() {
  const auto &kernels = elementwise::avx512vnni_kernels, &reference = elementwise::scalar_kernels;
  for (int64_t n = 1; n <= 40; ++n) {
    const std::vector<float> x = normal(2 * n, 4), w = normal(n);
    std::vector<float> got(n), want(n);
    kernels.rms_norm(x.data(), n, w.data(), 1e-5f, got.data());
    reference.rms_norm(x.data(), n, w.data(), 1e-5f, want.data());
    expect_close("rms_norm", got, want, 16);
    for (auto activation : {elementwise::kSilu, elementwise::kGeluTanh}) {
      kernels.gated(x.data(), w.data(), n, activation, got.data());
      reference.gated(x.data(), w.data(), n, activation, want.data());
      expect_close("gated", got, want, 16);
    }
    got = want = w;
    kernels.add(got.data(), x.data(), n);
    reference.add(want.data(), x.data(), n);
    expect_close("add", got, want, 0);
    kernels.softcap(got.data(), n, 2);
    reference.softcap(want.data(), n, 2);
    expect_close("softcap", got, want, 16);
    got = want = x;
    kernels.rotate(got.data(), n, w.data(), x.data());
    reference.rotate(want.data(), n, w.data(), x.data());
    expect_close("rotate", got, want, 16);
  }
}

void test_attention(attention::Type type, int head_dim, int rows, int positions, float softcap) {
  const int width = (head_dim + 15) / 16 * 16, padded = (positions + 15) / 16 * 16;
  const std::vector<float> k = normal(positions * head_dim), v = normal(positions * head_dim),
                           q = normal(rows * head_dim);
  std::vector<int64_t> first(rows), end(rows);
  for (int r = 0; r < rows; ++r) first[r] = r / 2, end[r] = std::max(r / 2 + 1, positions - (rows - 1 - r) * 2);
  std::vector<float> results[2];
  for (int which = 0; which < 2; ++which) {
    const attention::Kernels& kernels = which ? attention::scalar_kernels : attention::avx512vnni_kernels;
    std::vector<float> keys(padded * width), values(padded * width), key_scales(padded * 16), value_scales(padded * 8),
        largest(rows, attention::kLowest), total(rows * 16), out(rows * width), y(rows * head_dim),
        scratch(attention::scratch_floats(head_dim, width)), queries(rows * attention::query_floats(width));
    const attention::Head head = {keys.data(), values.data(), key_scales.data(), value_scales.data(), head_dim, width};
    for (int i = 0; i < positions; ++i) kernels.append[type](&k[i * head_dim], &v[i * head_dim], i, head);
    for (int r = 0; r < rows; ++r) {
      kernels.load_query[type](&q[r * head_dim], 1.5f, head_dim, width, &queries[r * attention::query_floats(width)]);
    }
    kernels.attend[type](head, {rows, queries.data(), first.data(), end.data(), softcap}, 0, positions,
                         {largest.data(), total.data(), out.data()}, scratch.data());
    for (int r = 0; r < rows; ++r) kernels.finish(&out[r * width], &total[r * 16], head_dim, &y[r * head_dim]);
    kernels.blend(out.data(), 0.5f, out.data() + width * (rows - 1), 0.25f, width);
    results[which] = y;
    results[which].insert(results[which].end(), out.begin(), out.begin() + width);
  }
  expect_close("attention", results[0], results[1], 256);
}

void test_logits() {
  for (int64_t n : {1, 2, 15, 16, 17, 100}) {
    const std::vector<float> p = normal(n, 4), noise = normal(n, 0.3f);
    std::vector<float> q = p;
    for (int64_t i = 0; i < n; ++i) q[i] += noise[i];
    const auto a = logits::avx512vnni_kernels.compare(p.data(), q.data(), n, n / 2),
               b = logits::scalar_kernels.compare(p.data(), q.data(), n, n / 2);
    expect_close("compare", {float(a.nll_p), float(a.nll_q), float(a.divergence), float(a.same_top), float(a.change)},
                 {float(b.nll_p), float(b.nll_q), float(b.divergence), float(b.same_top), float(b.change)}, 32);
    expect_close("log_sum_exp", {float(logits::avx512vnni_kernels.log_sum_exp(p.data(), n))},
                 {float(logits::scalar_kernels.log_sum_exp(p.data(), n))}, 8);
  }
}

}  // namespace

int main() {
  test_quantize();
  for (auto code : {linear::kU4, linear::kU6, linear::kS8}) {
    for (int group : {16, 32}) {
      for (auto second : {linear::kNone, linear::kMin, linear::kZero}) test_integer(code, group, second);
    }
  }
  test_integer(linear::kT4, 16, linear::kNone);
  test_integer(linear::kT4, 32, linear::kNone);
  for (Float type : {kF32, kF16, kBF16}) test_floats(type);
  test_elementwise();
  for (auto type : {attention::kFloat32, attention::kFloat16, attention::kInt8}) {
    test_attention(type, 8, 1, 5, 0);
    test_attention(type, 24, 5, 40, 2);
    test_attention(type, 80, 10, 70, 0);
    test_attention(type, 64, 32, 150, 0);
  }
  test_logits();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
