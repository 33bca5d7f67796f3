// What dispatch.cc and matrix.cc share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/linear/linear.h"

namespace tersor::linear {

inline constexpr int64_t kMinMacs = 1 << 17;  // multiply-adds worth a thread: about two microseconds

// Memory that grows as needed and is kept from call to call; what it held is gone when it grows.
template <typename T>
T* grown(LargeVector<T>& v, int64_t size) {
  if (int64_t(v.size()) < size) {
    LargeVector<T>().swap(v);
    v.resize(size);
  }
  return v.data();
}

inline int64_t chunks_of(int64_t columns) { return (columns + kChunk - 1) / kChunk; }

inline IntegerPanel panel_of(const Part& part, int64_t panel) {
  return {part.panels.data() + panel * part.panel_bytes, chunks_of(part.columns), part.layout};
}

// Where a part's outputs begin.
struct Output {
  const float* residual;
  float* y;
  int64_t stride;

  Finish finish(const Part& part, int64_t panel, int64_t row) const {
    const int64_t at = row * stride + panel * kPanelRows;
    return {part.scale.data() + panel * kPanelRows,
            part.bias.empty() ? nullptr : part.bias.data() + panel * kPanelRows,
            residual ? residual + at : nullptr,
            y + at,
            stride,
            int(std::min<int64_t>(kPanelRows, part.rows - panel * kPanelRows))};
  }
  // Of the second pass over a table finer than 8 bits, which adds to what the first has written.
  Finish low_finish(const Part& part, int64_t panel, int64_t row) const {
    Finish f = finish(part, panel, row);
    f.scale = part.low_scale.data() + panel * kPanelRows;
    f.bias = nullptr;
    f.residual = f.y;
    return f;
  }
};

inline IntegerPanel low_panel_of(const Part& part, int64_t panel) {
  IntegerPanel low = panel_of(part, panel);
  low.layout.table = part.low_table;
  return low;
}

// ---- Many rows by matrix tiles ----

// Rows of activations in bfloat16: in one part, as integers want them, or in all, as floats do.
struct MatrixScratch {
  LargeVector<uint16_t> tiles;
  MatrixRows rows;

  void round(const MatrixKernels& kernels, const float* x, int64_t n, int64_t columns, bool all_parts);
};

// Those of the instruction set in use, or null.
const MatrixKernels* matrix_kernels();

// Up to kMatrixTiles * kMatrixRows rows, rounded before. With `gate` the part's second half of rows is multiplied by
// the activated first half; either is whole panels.
void multiply_matrix(const MatrixKernels& kernels, const Part& part, const MatrixScratch& x, int64_t n,
                     const Output& out, const elementwise::Activation* gate = nullptr);

}  // namespace tersor::linear
