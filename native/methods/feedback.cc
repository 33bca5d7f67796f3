#include "methods/feedback.h"

#include <algorithm>
#include <cmath>

#include "base/threads.h"

namespace tersor {
namespace {

constexpr int64_t kGrain = 1 << 13;    // values worth handing to a thread
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: x + kRound - kRound rounds |x| < 2^22 half to even

int64_t grain(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)); }

// One row's view of the grid; `at(column)` must be called before the others.
class RowGrid {
 public:
  RowGrid(const LevelGrid& grid, int64_t row)
      : grid_(grid),
        step_row_(grid.step + row * grid.groups),
        offset_row_(grid.offset + row * grid.groups),
        top_(static_cast<float>(grid.n_levels - 1)) {}

  void at(int64_t column) {
    const int32_t group = grid_.group_of[column];
    if (group == group_) return;
    group_ = group;
    step_ = step_row_[group];
    offset_ = offset_row_[group];
    const float inverse = 1.0f / step_;
    inverse_ = std::isfinite(inverse) ? inverse : 0.0f;
  }

  float value(int index) const { return step_ * grid_.levels[index] + offset_; }

  // The index of the level nearest to w; halfway: to the even one of integers, to the lower one else.
  int nearest(float w) const {
    const float t = (w - offset_) * inverse_;
    if (grid_.integers) {
      const float above = t - grid_.levels[0];
      // In this order a NaN becomes 0; the limits come first, so that rounding stays within its range.
      const float limited = above > 0.0f ? (above < top_ ? above : top_) : 0.0f;
      return static_cast<int>((limited + grid_.levels[0] + kRound - kRound) - grid_.levels[0]);
    }
    int index = 0;
    for (int k = 1; k < grid_.n_levels; k++) index += t > 0.5f * (grid_.levels[k - 1] + grid_.levels[k]);
    return index;
  }

 private:
  const LevelGrid& grid_;
  const float* step_row_;
  const float* offset_row_;
  float top_;
  int32_t group_ = -1;
  float step_ = 0.0f, offset_ = 0.0f, inverse_ = 0.0f;
};

// y += a * x
void add_scaled(float a, const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

}  // namespace

void feed_back(int64_t rows, int64_t columns, const LevelGrid& grid, const float* w, const float* feedback,
               float* target, uint8_t* indices, float* errors) {
  parallel_for(rows, grain(columns), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      RowGrid levels(grid, row);
      const int64_t at = row * columns;
      for (int64_t k = 0; k < columns; k++) {
        levels.at(k);
        const int index = levels.nearest(target[at + k]);
        const float error = w[at + k] - levels.value(index);
        indices[at + k] = static_cast<uint8_t>(index);
        errors[at + k] = error;
        add_scaled(error, feedback + k * columns + k + 1, columns - k - 1, target + at + k + 1);
      }
    }
  });
}

void descend(int64_t rows, int64_t columns, const LevelGrid& grid, const float* hessian, float* gradient,
             uint8_t* indices, float* changes) {
  parallel_for(rows, grain(columns), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      RowGrid levels(grid, row);
      const int64_t at = row * columns;
      for (int64_t k = 0; k < columns; k++) {
        changes[at + k] = 0.0f;
        const float* h = hessian + k * columns;
        if (!(h[k] > 0.0f)) continue;
        levels.at(k);
        const float now = levels.value(indices[at + k]);
        const int best = levels.nearest(now - gradient[at + k] / h[k]);
        if (best == indices[at + k]) continue;
        const float change = levels.value(best) - now;
        indices[at + k] = static_cast<uint8_t>(best);
        changes[at + k] = change;
        add_scaled(change, h + k + 1, columns - k - 1, gradient + at + k + 1);
      }
    }
  });
}

}  // namespace tersor
