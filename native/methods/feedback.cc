#include "methods/feedback.h"

#include <algorithm>
#include <vector>

#include "base/cpu.h"
#include "base/threads.h"
#include "methods/feedback_rows.h"

namespace tersor {
namespace {

constexpr int64_t kGrain = 1 << 13;  // values worth handing to a thread

// Calls body(tile) for every kLanes rows.
template <typename Body>
void for_rows(int64_t rows, int64_t columns, const Body& body) {
  const int64_t grain = std::max<int64_t>(kLanes, kGrain / std::max<int64_t>(1, columns));
  parallel_for(rows, grain, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(3 * columns * kLanes);
    for (int64_t row = first; row < last; row += kLanes) {
      TileRows tile = {{}, static_cast<int>(std::min<int64_t>(kLanes, last - row)), columns, scratch.data()};
      for (int i = 0; i < kLanes; i++) tile.rows[i] = row + std::min(i, tile.count - 1);
      body(tile);
    }
  });
}

}  // namespace

void feed_back(int64_t rows, int64_t columns, const LevelGrid& grid, const float* w, const float* feedback,
               const float* target, uint8_t* indices, float* errors) {
  for_rows(rows, columns, [&](const TileRows& tile) {
#if defined(__x86_64__)
    if (active_isa() != Isa::kScalar) return feed_back_avx2(tile, grid, w, feedback, target, indices, errors);
#endif
    feed_back_scalar(tile, grid, w, feedback, target, indices, errors);
  });
}

void descend(int64_t rows, int64_t columns, const LevelGrid& grid, const float* hessian, float* gradient,
             uint8_t* indices, float* changes) {
  for_rows(rows, columns, [&](const TileRows& tile) {
#if defined(__x86_64__)
    if (active_isa() != Isa::kScalar) return descend_avx2(tile, grid, hessian, gradient, indices, changes);
#endif
    descend_scalar(tile, grid, hessian, gradient, indices, changes);
  });
}

}  // namespace tersor
