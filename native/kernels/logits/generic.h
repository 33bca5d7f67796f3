// Softmax statistics, once. Included by one file per instruction set, after base/simd/.
#pragma once

#include "base/simd/math.h"
#include "kernels/logits/kernels.h"

namespace tersor::logits {
namespace {

const float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Sixteen logits from i on; those beyond n have no probability.
inline F load_logits(const float* x, int64_t i, int64_t n) {
  if (n - i >= 16) return load(x + i);
  return select_less(load(kIota), set(float(n - i)), load_n(x + i, int(n - i)), set(-1e30f));
}

float largest(const float* x, int64_t n) {
  F m = set(x[0]);
  for (int64_t i = 0; i < n; i += 16) m = max(m, load_logits(x, i, n));
  return max_of(m);
}

// The index of the largest value, the first of equals: of the first part that holds it.
int64_t top(const float* x, int64_t n) {
  constexpr int64_t kPart = 1024;
  int64_t part = 0;
  float most = largest(x, n < kPart ? n : kPart);
  for (int64_t at = kPart; at < n; at += kPart) {
    const float found = largest(x + at, n - at < kPart ? n - at : kPart);
    if (found > most) most = found, part = at;
  }
  for (int64_t i = part; i < n && i < part + kPart; ++i) {
    if (x[i] == most) return i;
  }
  return 0;  // NaN is among them
}

// e^y = 2^k e^r, k = round(y / ln 2), |r| <= ln 2 / 2, by Taylor's series to r^13 / 13! (relative error 2^-58). Plain
// loops, which compilers turn into vectors.
void weigh(const float* x, int64_t n, float most, double scale, double* out) {
  constexpr double kLog2e = 1.4426950408889634, kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  constexpr double kRound = 0x1.8p52;  // a sum with it has the rounded integer in its low bits
  constexpr double kTerms[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  for (int64_t i = 0; i < n; ++i) {
    const double y = (double(x[i]) - double(most)) * scale, bounded = y < -700.0 ? -700.0 : y;
    const double shifted = bounded * kLog2e + kRound, k = shifted - kRound;
    const double r = (bounded - k * kLn2High) - k * kLn2Low;
    double s = kTerms[0];
    for (int j = 1; j < 14; ++j) s = s * r + kTerms[j];
    uint64_t bits;
    __builtin_memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52;
    double power;
    __builtin_memcpy(&power, &bits, 8);
    out[i] = y < -700.0 ? 0.0 : s * power;
  }
}

// sum of e^(x - most)
double sum_exp(const float* x, int64_t n, float most) {
  const F most16 = set(most);
  double total = 0;
  for (int64_t i = 0; i < n; i += 16) total += sum_f64(exp(sub(load_logits(x, i, n), most16)));
  return total;
}

double log_sum_exp(const float* x, int64_t n) {
  const float most = largest(x, n);
  return most + __builtin_log(sum_exp(x, n, most));
}

// t + e^-t - 1 for |t| < 1/2, relative error of some 2^-23: t^2/2 (1 - t/3 (1 - t/4 (1 - t/5 (...)))).
inline F excess(const F& t) {
  F s = set(1.0f);
  for (int k = 8; k >= 3; --k) s = sub(set(1.0f), mul(mul(t, set(1.0f / float(k))), s));
  return mul(mul(mul(t, t), set(0.5f)), s);
}

// KL(p || q) = sum_i p_i (t_i + e^-t_i - 1), t = log p - log q, since sum p e^-t = sum q = 1. Every term is >= 0 and of
// second order in t, so that close distributions lose no digits, and an error in the normalization only counts squared.
Comparison compare(const float* p, const float* q, int64_t n, int64_t target) {
  const int64_t top_p = top(p, n), top_q = top(q, n);
  const double total_p = sum_exp(p, n, p[top_p]), total_q = sum_exp(q, n, q[top_q]);
  const double lp = p[top_p] + __builtin_log(total_p), lq = q[top_q] + __builtin_log(total_q);
  const F most_p = set(p[top_p]), most_q = set(q[top_q]), scale_p = set(float(1 / total_p)),
          scale_q = set(float(1 / total_q));
  const F shift = set(float(lp - lq)), half = set(0.5f), one = set(1.0f);
  double divergence = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const F a = load_logits(p, i, n), b = load_logits(q, i, n);
    const F pa = mul(exp(sub(a, most_p)), scale_p), qb = mul(exp(sub(b, most_q)), scale_q), t = sub(sub(a, b), shift);
    divergence += sum_f64(select_less(abs(t), half, mul(pa, excess(t)), add(mul(pa, sub(t, one)), qb)));
  }
  const double tp = p[target] - lp, tq = q[target] - lq;
  return {-tp, -tq, divergence, top_p == top_q ? 1.0 : 0.0, __builtin_exp(tq) - __builtin_exp(tp)};
}

#define TERSOR_LOGITS_KERNELS {log_sum_exp, compare, weigh, top}

}  // namespace
}  // namespace tersor::logits
