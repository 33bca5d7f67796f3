#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "base/isa_table.h"
#include "base/threads.h"
#include "kernels/linear/linear.h"

namespace tersor::linear {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kMinMacs = 1 << 16;          // multiply-adds worth a thread: some microseconds
constexpr int64_t kActivationBytes = 4 << 20;  // activations at a time, so that they stay in the outer cache

// Grows as needed and is kept by the calling thread from call to call.
struct Scratch {
  std::vector<int8_t> codes;
  std::vector<float> scale, sums16, sums32;

  Activations quantize(const Kernels& kernels, const float* x, int64_t n, int64_t columns) {
    const int64_t groups = (columns + kActivationGroup - 1) / kActivationGroup;
    if (int64_t(scale.size()) < n * groups) {
      codes.resize(n * groups * 32);
      scale.resize(n * groups);
      sums16.resize(n * groups * 2);
      sums32.resize(n * groups);
    }
    parallel_for(n, std::max<int64_t>(1, kMinMacs / 4 / columns), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        kernels.quantize(x + row * columns, columns, &codes[row * groups * 32], &scale[row * groups],
                         &sums16[row * groups * 2], &sums32[row * groups]);
      }
    });
    return {codes.data(), scale.data(), {sums16.data(), sums32.data()}, groups};
  }
};

// One panel of a part for n activation rows.
void run_panel(const Kernels& kernels, const Part& part, int64_t panel, const float* x, const Activations& quantized,
               int n, Finish finish) {
  finish.scale = part.scale.data() + panel * kPanelRows;
  finish.bias = part.bias.empty() ? nullptr : part.bias.data() + panel * kPanelRows;
  finish.rows = int(std::min<int64_t>(kPanelRows, part.rows - panel * kPanelRows));
  const uint8_t* data = part.panels.data() + panel * part.panel_bytes;
  if (!part.integer) return kernels.floating[part.floating](data, part.columns, x, part.columns, n, finish);
  const int64_t groups = part.panel_bytes / block_bytes(part.code, part.group, part.second);
  kernels.integer[part.code][part.group == 32][part.second]({data, groups, part.offset, part.table}, quantized, n,
                                                            finish);
}

}  // namespace

Bytes::Bytes(int64_t size) : size_(size) {
  const int64_t alignment = size >= kHugePage ? kHugePage : 64;
  auto* p = static_cast<uint8_t*>(
      std::aligned_alloc(alignment, std::max(alignment, (size + alignment - 1) / alignment * alignment)));
  if (!p) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == kHugePage) madvise(p, size, MADV_HUGEPAGE);  // only a hint
#endif
  data_.reset(p);
}

void Bytes::Free::operator()(uint8_t* p) const { std::free(p); }

int64_t Weight::nbytes() const {
  int64_t total = 0;
  for (const Part& p : parts) total += p.panels.size() + 4 * int64_t(p.scale.size() + p.bias.size());
  return total;
}

std::string Weight::kernel() const {
  static const char* const kCodeNames[] = {"u4", "u6", "s8", "t4"};
  static const char* const kSecondNames[] = {"", "min", "zero"};
  static const char* const kFloatNames[] = {"f32", "f16", "bf16"};
  std::string text = isa_name(active_isa());
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& p = parts[i];
    text.push_back(i == 0 ? ' ' : '+');
    if (p.integer)
      text.append(kCodeNames[p.code]).append(p.group == 32 ? "x32" : "x16").append(kSecondNames[p.second]);
    else
      text.append(kFloatNames[p.floating]);
  }
  return text;
}

void multiply(const float* x, int64_t n, const Weight& weight, const float* residual, float* y) {
  static thread_local Scratch scratch;
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  const bool integer = std::any_of(weight.parts.begin(), weight.parts.end(), [](const Part& p) { return p.integer; });
  const int64_t chunk =
      std::max<int64_t>(1, kActivationBytes / ((integer ? 1 : 4) * weight.columns) / kMaxRows) * kMaxRows;
  int64_t panels = 0;
  for (const Part& p : weight.parts) panels += p.panel_count();
  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t rows = std::min(chunk, n - first);
    const float* x_chunk = x + first * weight.columns;
    const Activations quantized = integer ? scratch.quantize(kernels, x_chunk, rows, weight.columns) : Activations{};
    // The unit of work is one panel for one block of activation rows; the blocks of a panel follow each other.
    const int64_t blocks = (rows + kMaxRows - 1) / kMaxRows;
    const int64_t grain =
        std::max<int64_t>(1, kMinMacs / (weight.columns * kPanelRows * std::min<int64_t>(rows, kMaxRows)));
    parallel_for(panels * blocks, grain, [&](int64_t begin, int64_t end) {
      int64_t first_panel = 0, row_offset = 0;
      for (const Part& part : weight.parts) {
        const int64_t count = part.panel_count();
        for (int64_t unit = std::max(begin, first_panel * blocks); unit < std::min(end, (first_panel + count) * blocks);
             ++unit) {
          const int64_t panel = unit / blocks - first_panel, block_row = unit % blocks * kMaxRows;
          const int64_t at = (first + block_row) * weight.rows + row_offset + panel * kPanelRows;
          const Finish finish = {nullptr, nullptr, residual ? residual + at : nullptr, y + at, weight.rows, 0};
          run_panel(kernels, part, panel, x_chunk + block_row * weight.columns,
                    integer ? quantized.from_row(block_row) : quantized,
                    int(std::min<int64_t>(kMaxRows, rows - block_row)), finish);
        }
        first_panel += count;
        row_offset += part.rows;
      }
    });
  }
}

}  // namespace tersor::linear
