// exp and tanh of sixteen floats. Include after a header of base/simd/.
#pragma once

namespace tersor {
namespace {

// e^x, relative error below 2e-7 (checked over all magnitudes by tests/conformance/test_ops.py). 0 below -87.3, where
// the result would be subnormal; e^88.37 above 88.37; NaN for NaN. e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln(2)/2;
// the polynomial is Cephes' expf (Moshier, netlib cephes/single/expf.c).
inline F exp(const F& x) {
  constexpr float kLowest = -87.3f, kHighest = 88.37f;
  const F bounded = min(set(kHighest), max(set(kLowest), x));
  const I n = round_to_int(mul(bounded, set(1.44269504088896341f)));
  const F nf = to_float(n);
  // ln 2 in two parts, the first of 9 bits, so that n * first is exact.
  const F r = fma(nf, set(2.12194440e-4f), fma(nf, set(-0.693359375f), bounded));
  F p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), set(1.0f));
  return select_less(x, set(kLowest), zero(), scale_by_power(p, n));
}

// 2^x, relative error below 2e-7; 0 or subnormal below -126, x <= 127. 2^x = 2^n 2^r, n = round(x), |r| <= 1/2; the
// polynomial was fitted to the least largest relative error (9.2e-8), exact at 0.
inline F exp2(const F& x) {
  const F n = round(x);
  const F r = sub(x, n);
  F p = set(1.326472614891827e-3f);
  p = fma(p, r, set(9.671512991189957e-3f));
  p = fma(p, r, set(5.550733581185341e-2f));
  p = fma(p, r, set(2.402224242687225e-1f));
  p = fma(p, r, set(6.931470036506653e-1f));
  return scale_by_power(fma(p, r, set(1.0f)), n);
}

// tanh x, relative error below 5e-7. Near 0 an odd polynomial (Cephes tanhf), since 1 - 2 / (e^2x + 1) cancels there.
inline F tanh(const F& x) {
  const F z = mul(x, x);
  F p = set(-5.70498872745e-3f);
  p = fma(p, z, set(2.06390887954e-2f));
  p = fma(p, z, set(-5.37397155531e-2f));
  p = fma(p, z, set(1.33314422036e-1f));
  p = fma(p, z, set(-3.33332819422e-1f));
  const F small = fma(mul(p, z), x, x);
  const F large = sub(set(1.0f), div(set(2.0f), add(exp(add(x, x)), set(1.0f))));
  return select_less(abs(x), set(0.625f), small, large);
}

// x / (1 + e^-x)
inline F silu(const F& x) { return near_div(x, add(set(1.0f), exp(sub(zero(), x)))); }

// x/2 (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
inline F gelu_tanh(const F& x) {
  const F u = mul(set(0.7978845608028654f), fma(mul(mul(set(0.044715f), x), x), x, x));
  return near_div(x, add(set(1.0f), exp(mul(set(-2.0f), u))));
}

}  // namespace
}  // namespace tersor
