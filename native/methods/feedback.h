// The sequential loops of methods that round column by column: each choice changes what the next columns aim at.
//
// Both work on a tile of consecutive columns and leave everything that reaches beyond it to matrix products of the
// caller, so their cost is that of the tile alone. Rows do not depend on each other.
#pragma once

#include <cstdint>

namespace tersor {

// The values a code can stand for: step * level + offset, with a step and an offset for each row and group of columns.
struct LevelGrid {
  const float* levels;  // increasing
  int n_levels;         // 1 to 256
  bool integers;        // neighbouring levels differ by 1
  const float* step;    // (rows, groups)
  const float* offset;  // (rows, groups)
  int64_t groups;
  const int32_t* group_of;  // (columns): the group of each column of the tile
};

// Error feedback. w: (rows, columns) weights of the tile; target: likewise, what the errors of earlier tiles leave to
// be rounded; feedback: (columns, columns), of which entry (j, k), j < k, is how much of the error
// of column j goes to the target of column k. Writes indices (of the nearest levels) and errors (w - value).
void feed_back(int64_t rows, int64_t columns, const LevelGrid& grid, const float* w, const float* feedback,
               const float* target, uint8_t* indices, float* errors);

// One sweep of coordinate descent on E H E^T, E = value - w. gradient: (rows, columns), E H, kept up to date within the
// tile for the columns to come; hessian: (columns, columns) of H, its diagonal >= 0 (columns with 0 are left alone).
// Each column in turn goes to the level nearest to its minimum. Changes indices; writes changes (rows, columns), by how
// much each value moved.
void descend(int64_t rows, int64_t columns, const LevelGrid& grid, const float* hessian, float* gradient,
             uint8_t* indices, float* changes);

}  // namespace tersor
