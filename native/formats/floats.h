// Whole arrays of floats: widened to float32 and back, and what is asked of weights before and after rounding. The
// loops are plain and have no branches, so that a compiler makes vectors of them for the lowest CPU; each runs on the
// thread pool and gives the same bits for any number of threads. No checks; caller owns memory.
#pragma once

#include <cstdint>

namespace tersor {

// wide[i] = the float16 or bfloat16 of values[i], exact; a NaN keeps its payload.
void widen_f16(const uint16_t* values, int64_t n, float* wide);
void widen_bf16(const uint16_t* values, int64_t n, float* wide);

// halves[i] = the float16 nearest to w[i], ties to even; from 65520 on infinity.
void narrow_f16(const float* w, int64_t n, uint16_t* halves);

// The largest |w[i]|: 0 of nothing, infinity when there is one, NaN when there is one.
float largest_magnitude(const float* w, int64_t n);

struct SquareSums {
  double w, error;  // sum w^2, sum (decoded - w)^2
};

// Squares and sums of 256 values are float32, the sum of those float64.
SquareSums square_sums(const float* w, const float* decoded, int64_t n);

}  // namespace tersor
