// Affine integer formats: the fit of a group's grid, rounding to it, and back. Mirrors src/tersor/formats/affine.py bit
// for bit.
//
//   zero     w = (q - offset) * scale    offset: the integer zero, as a float
//   minimum  w = q * scale + offset      offset: the group's minimum
// q in 0..max_code. Scales (and minima) are values that float16 holds, or with `single` any; they travel as float32.
#pragma once

#include <cstdint>

namespace tersor {

enum class AffineKind { kAsymmetric, kSymmetric, kMinimum };

struct AffineGrid {
  float scale;
  float offset;
};

// The weights that share a grid: `segments` runs of n consecutive values, contiguous. importance: n values for every
// run alike, or null. single: the grid's floats are stored as float32, not as float16.
struct AffineGroup {
  const float* w;
  const float* importance;
  int64_t segments;
  int64_t n;
  bool single = false;
};

// Nearest float16, ties to even, as a float32; a subnormal result is rounded up; beyond 65504 gives infinity. x >= 0.
// single: x itself, 0 for -0.
float affine_stored_scale(float x, bool single);

// Nearest float16, ties to even, as a float32. single: x itself, 0 for -0.
float affine_stored_minimum(float x, bool single);

// The grid from lo to hi (lo <= 0 <= hi when asymmetric). A scale of 0 means: all values are the same level.
AffineGrid affine_range_grid(float lo, float hi, AffineKind kind, int max_code, bool single);

// The min-max grid. search: the grid of the least (importance-weighted) squared error over clipped ranges, see
// affine_search.inc.
AffineGrid affine_fit(const AffineGroup& group, AffineKind kind, int max_code, bool search);

// Parameters of a matrix: element (row, group) is at row * row_stride + group * group_stride; strides of 0 broadcast.
struct AffineParams {
  const float* values;
  int64_t row_stride;
  int64_t group_stride;
};

struct AffineMatrix {
  int64_t rows;
  int64_t columns;
  int64_t groups;  // divides columns
  bool minimum;    // the meaning of offset
  int bits;
  int max_code;
  AffineParams scale;
  AffineParams offset;
};

// packed: (rows, packed_bytes(columns, bits)). Rounding is half to even; values outside the grid go to its ends.
void affine_encode(const AffineMatrix& m, const float* w, uint8_t* packed);
void affine_decode(const AffineMatrix& m, const uint8_t* packed, float* w);

}  // namespace tersor
