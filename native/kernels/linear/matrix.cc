#include "base/cpu.h"
#include "base/threads.h"
#include "kernels/linear/dispatch.h"

namespace tersor::linear {
namespace {

constexpr int64_t kNearBytes = 768 << 10;  // activations that stay in a core's outer cache beside all else

// Panels of one call of the kernel. All activations are read for each, so there are many where they do not stay near;
// but so few that every thread gets a share, in pairs.
int64_t panels_at_a_time(const Part& part, int64_t n) {
  const bool near = n * part.columns * 2 * (part.integer ? 1 : kMatrixParts) <= kNearBytes;
  const int64_t most = near ? kMatrixPanels / 4 : kMatrixPanels, pairs = (part.panel_count() + 1) / 2;
  const int64_t calls = std::max<int64_t>(2 * threads(), (2 * pairs + most - 1) / most);
  return 2 * std::max<int64_t>(1, (pairs + calls - 1) / calls);
}

}  // namespace

const MatrixKernels* matrix_kernels() {
#ifdef TERSOR_HAS_AMX
  if (active_isa() == Isa::kAmx) return &amx_matrix_kernels;
#endif
  return nullptr;
}

void MatrixScratch::round(const MatrixKernels& kernels, const float* x, int64_t n, int64_t columns, bool all_parts) {
  const int64_t count = (n + kMatrixRows - 1) / kMatrixRows, size = chunks_of(columns) * kMatrixRows * kChunk;
  uint16_t* to = grown(tiles, count * size * (all_parts ? kMatrixParts : 1));
  rows = {to, count};
  parallel_for(count, std::max<int64_t>(1, kMinMacs / 4 / (columns * kMatrixRows)), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kMatrixRows;
      kernels.round[all_parts](x + first * columns, columns, int(std::min<int64_t>(kMatrixRows, n - first)), columns,
                               tile, count, to);
    }
  });
}

void multiply_matrix(const MatrixKernels& kernels, const Part& part, const MatrixScratch& x, int64_t n,
                     const Output& out) {
  const int64_t panels = part.panel_count(), each = panels_at_a_time(part, n), calls = (panels + each - 1) / each;
  parallel_for(calls, 1, [&](int64_t begin, int64_t end) {
    static thread_local LargeVector<float> sums;
    float* room = grown(sums, each * kPanelRows * (x.rows.count + 1) * kMatrixRows);
    for (int64_t call = begin; call < end; ++call) {
      const int64_t panel = call * each, count = std::min(each, panels - panel);
      Finish finish = out.finish(part, panel, 0);
      finish.rows = int(std::min<int64_t>(kPanelRows * count, part.rows - panel * kPanelRows));
      const uint8_t* first = part.panels.data() + panel * part.panel_bytes;
      if (part.integer)
        kernels.multiply({first, chunks_of(part.columns), part.layout}, part.panel_bytes, int(count), part.low_table,
                         x.rows, n, finish, room);
      else
        kernels.floating[part.floating](first, part.panel_bytes, int(count), part.columns, x.rows, n, finish, room);
    }
  });
}

}  // namespace tersor::linear
