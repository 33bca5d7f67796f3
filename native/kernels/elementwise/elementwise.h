// The ops that touch every value once, over rows, on the thread pool.
#pragma once

#include <cstdint>

#include "kernels/elementwise/kernels.h"

namespace tersor::elementwise {

// y (rows, d) = rms_norm of x (rows, d); y may be x.
void rms_norm(const float* x, int64_t rows, int64_t d, const float* weight, float eps, float* y);

// y (rows, f) = act(x[:, :f]) * x[:, f:]
void gated(const float* x, int64_t rows, int64_t f, Activation activation, float* y);

// x += y
void add(float* x, const float* y, int64_t n);

// x = cap * tanh(x / cap)
void softcap(float* x, int64_t n, float cap);

// x: n rows, `row_stride` values apart, of (heads, 2 * half); row i is rotated by positions[i] * inv_freq[j] radians,
// the product in float32 as in Hugging Face's rotary embedding; cosines and sines, taken in float64, are multiplied by
// scale.
void rope(float* x, int64_t n, int64_t row_stride, int64_t heads, int64_t half, const int32_t* positions,
          const float* inv_freq, float scale);

// The same for rows at positions start, start + 1, ...
void rope_from(float* x, int64_t n, int64_t row_stride, int64_t heads, int64_t half, int64_t start,
               const float* inv_freq, float scale);

// The same by given angles: row i by the (half) cosines and sines at i * angle_stride.
void rotate(float* x, int64_t n, int64_t row_stride, int64_t heads, int64_t half, const float* cosines,
            const float* sines, int64_t angle_stride);

}  // namespace tersor::elementwise
