#include "base/cpu.h"
#include "base/threads.h"
#include "kernels/linear/dispatch.h"

namespace tersor::linear {
namespace {

constexpr int64_t kNearBytes = 768 << 10;  // activations that stay in a core's outer cache beside all else

// Panels of one call of the kernel, of which there are `panels`, each worth `products`. All activations are read for
// each, so there are many where they do not stay near; in pairs; and the largest number that leaves threads the least
// to do alone at the end.
int64_t panels_at_a_time(const Part& part, int64_t n, int64_t panels, int64_t products) {
  const bool near = n * part.columns * 2 * (part.integer ? 1 : kMatrixParts) <= kNearBytes;
  const int64_t most = (near ? kMatrixPanels / 4 : kMatrixPanels) / 2, pairs = (panels * products + 1) / 2;
  int64_t best = 1, best_time = pairs;  // in pairs of the thread that does the most
  for (int64_t each = 1; each <= most; ++each) {
    const int64_t calls = (pairs + each - 1) / each, time = (calls + threads() - 1) / threads() * each;
    if (time <= best_time) best = each, best_time = time;
  }
  return std::max<int64_t>(1, best * 2 / products);
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
                     const Output& out, const elementwise::Activation* gate) {
  const int64_t all = part.panel_count(), panels = gate ? all / 2 : all, products = gate ? 2 : 1;
  const int64_t each = panels_at_a_time(part, n, panels, products), calls = (panels + each - 1) / each;
  parallel_for(calls, 1, [&](int64_t begin, int64_t end) {
    static thread_local LargeVector<float> sums;
    float* room = grown(sums, (each * products + 1) * kPanelRows * (x.rows.count + 1) * kMatrixRows);
    for (int64_t call = begin; call < end; ++call) {
      const int64_t panel = call * each;
      MatrixPanels some{part.panels.data() + panel * part.panel_bytes, part.panel_bytes,
                        int(std::min(each, panels - panel))};
      if (gate) some.up = panels, some.activation = *gate;
      Finish finish = out.finish(part, panel, 0);
      finish.rows = int(std::min<int64_t>(kPanelRows * some.count, part.rows - panel * kPanelRows));
      if (part.integer)
        kernels.multiply(some, part.layout, chunks_of(part.columns), part.low_table, x.rows, n, finish, room);
      else
        kernels.floating[part.floating](some, part.columns, x.rows, n, finish, room);
    }
  });
}

}  // namespace tersor::linear
