// y = x W^T + bias + residual for weights in any number format, repacked once for the kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/memory.h"
#include "kernels/linear/kernels.h"

namespace tersor::linear {

// Consecutive rows of a weight that share a number format.
struct Part {
  int64_t rows, columns;
  bool integer;
  Layout layout;            // if integer
  const int8_t* low_table;  // of tables finer than 8 bits: added 128 times smaller; else null
  Float floating;           // if not
  int64_t panel_bytes;
  Bytes panels;
  LargeVector<float> scale;           // (panels * 16) per row
  LargeVector<float> bias = {};       // the same, or empty
  LargeVector<float> low_scale = {};  // scale / 128 when there is a low_table, else empty

  int64_t panel_count() const { return (rows + kPanelRows - 1) / kPanelRows; }
};

struct Weight {
  int64_t rows = 0, columns = 0;  // columns of x
  std::vector<Part> parts;
  Rounding rounding;           // of the activations of integer parts
  std::vector<int32_t> order;  // (columns): the column of x at each place of the weight's columns; empty = as they are
  std::vector<Part> apart;     // none, or one float part of all rows: its columns are the last places of order

  // Columns of the parts, the first places of order.
  int64_t inner() const { return columns - (apart.empty() ? 0 : apart[0].columns); }

  Weight() = default;
  Weight(const Weight&) = delete;
  Weight& operator=(const Weight&) = delete;

  int64_t nbytes() const;
  // What computes it, e.g. "avx2 u4x32min"; parts are joined by '+', columns apart by '&' (their number last, as in
  // s8x256&f16x6); then how activations are rounded, unless kGroups.
  std::string kernel() const;
};

// y (n, rows) = x (n, columns) W^T + bias + residual (n, rows); residual may be null and may be y. Integer parts round
// x as weight.rounding says; kGroups to 15 bits per 32 columns when n <= kFineRows, else to 8 bits, twice 8 where a row
// has outliers. Columns apart are multiplied as they are, in float32, and no part sees them. A row has the same bits
// for every n <= kFineRows, and for every n above.
void multiply(const float* x, int64_t n, const Weight& weight, const float* residual, float* y);

// y (n, rows / 2) = act(the first half of x W^T + bias) * the second half: the same bits as multiply and gated have,
// with no more than their result in memory where the kernels can.
void multiply_gated(const float* x, int64_t n, const Weight& weight, elementwise::Activation activation, float* y);

}  // namespace tersor::linear
