#include "kernels/logits/logits.h"

#include <algorithm>
#include <cmath>

#include "kernels/kernel_test.h"

namespace tersor::test {
namespace {

constexpr double kExp = 4;  // roundings of e^x (base/simd/math.h)

double log_sum_exp(const float* x, int64_t n) {
  const double most = double(*std::max_element(x, x + n));
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += std::exp(double(x[i]) - most);
  return most + std::log(total);
}

// e^(x - most) errs by kExp roundings and by one of x - most, sums are float64: so does the logarithm of the sum, by
// the mean of these under the softmax.
double log_sum_exp_bound(const float* x, int64_t n) {
  const double lse = log_sum_exp(x, n), most = double(*std::max_element(x, x + n));
  double mean = 0;
  for (int64_t i = 0; i < n; ++i) mean += std::exp(double(x[i]) - lse) * (kExp + most - double(x[i]));
  return kRounding * mean;
}

void test_nll(int64_t rows, int64_t vocab) {
  Random random{uint32_t(rows * 7 + vocab)};
  const std::vector<float> x = random.bells(rows * vocab, 4);
  std::vector<int32_t> targets(rows);
  Expected want;
  for (int64_t i = 0; i < rows; ++i) {
    targets[i] = random.below(int(vocab));
    const float* row = &x[i * vocab];
    const double y = log_sum_exp(row, vocab) - double(row[targets[i]]);
    want.add(y, log_sum_exp_bound(row, vocab) + kRounding * y);  // the result is compared as a float
  }
  expect_everywhere(
      "nll",
      [&] {
        std::vector<double> out(rows);
        logits::nll(x.data(), rows, vocab, targets.data(), out.data());
        return Result(out.begin(), out.end());
      },
      want);
}

// KL(p || q) = sum p_i (t_i + e^-t_i - 1), t = log p - log q. With t known to dt, a term errs by p |1 - e^-t| dt, and
// by the roundings of its parts: p t^2 / 2 for small t (some 30 operations of the series), p (|t| + 1) + q else.
Expected expected_comparison(const float* p, const float* q, int64_t n, int64_t target) {
  const double lp = log_sum_exp(p, n), lq = log_sum_exp(q, n);
  const double dlp = log_sum_exp_bound(p, n), dlq = log_sum_exp_bound(q, n);
  const double most_p = double(*std::max_element(p, p + n)), most_q = double(*std::max_element(q, q + n));
  double divergence = 0, bound = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double t = double(p[i]) - lp - (double(q[i]) - lq), pi = std::exp(double(p[i]) - lp),
                 qi = std::exp(double(q[i]) - lq);
    const double dt =
        dlp + dlq + kRounding * (std::fabs(double(p[i]) - double(q[i])) + std::fabs(lp - lq) + std::fabs(t));
    const double parts = std::fabs(t) < 0.4999 ? pi * t * t / 2 : pi * (std::fabs(t) + 1) + qi;
    const double roundings = 30 + (most_p - double(p[i])) + (most_q - double(q[i]));
    divergence += pi * (t + std::exp(-t) - 1);
    bound += pi * std::fabs(1 - std::exp(-t)) * dt + roundings * kRounding * parts;
  }
  const double nll_p = lp - double(p[target]), nll_q = lq - double(q[target]);
  const double change = std::exp(-nll_q) - std::exp(-nll_p);
  Expected want;
  want.add(nll_p, dlp + kRounding * nll_p);
  want.add(nll_q, dlq + kRounding * nll_q);
  want.add(divergence, bound + kRounding * divergence);
  want.add(std::max_element(p, p + n) - p == std::max_element(q, q + n) - q, 0);
  want.add(change, std::exp(-nll_q) * dlq + std::exp(-nll_p) * dlp + kRounding * std::fabs(change));
  return want;
}

void test_compare(int64_t rows, int64_t vocab, float noise) {
  Random random{uint32_t(rows * 11 + vocab)};
  const std::vector<float> p = random.bells(rows * vocab, 4);
  std::vector<float> q = p;
  for (float& x : q) x += random.bell() * noise;
  std::vector<int32_t> targets(rows);
  Expected want;
  for (int64_t i = 0; i < rows; ++i) {
    targets[i] = random.below(int(vocab));
    const Expected row = expected_comparison(&p[i * vocab], &q[i * vocab], vocab, targets[i]);
    want.value.insert(want.value.end(), row.value.begin(), row.value.end());
    want.bound.insert(want.bound.end(), row.bound.begin(), row.bound.end());
  }
  expect_everywhere(
      "compare",
      [&] {
        std::vector<logits::Comparison> out(rows);
        logits::compare(p.data(), q.data(), rows, vocab, targets.data(), out.data());
        Result y;
        for (const auto& c : out) {
          for (double v : {c.nll_p, c.nll_q, c.divergence, c.same_top, c.change}) y.push_back(float(v));
        }
        return y;
      },
      want);
}

}  // namespace

void test_logits() {
  for (int64_t vocab = 1; vocab <= 40; ++vocab) {
    test_nll(3, vocab);
    test_compare(3, vocab, 0.3f);
    test_compare(3, vocab, 4);
  }
  test_nll(7, 5003);
  test_compare(7, 5003, 0.05f);
  test_compare(7, 5003, 2);
}

}  // namespace tersor::test
