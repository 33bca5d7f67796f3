#include "kernels/linear/dispatch.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "base/isa_table.h"
#include "base/threads.h"

namespace tersor::linear {
namespace {

constexpr int64_t kGatherValues = 1 << 14;     // values moved worth a thread
constexpr int64_t kActivationBytes = 4 << 20;  // activations at a time, so that they stay in the outer cache

const Kernels& active_kernels() { return TERSOR_OR_TILE_KERNELS(TERSOR_ACTIVE_BYTE_KERNELS()); }

// Of every sum of q (over the halves of a chunk, `inner` values each): start = offset * sum and, where the layout has a
// second number, scaled = scale * sum; for both halves, or for the whole chunk when groups are wider.
void scale_sums(const Layout& l, const int32_t* sums, const float* scale, int64_t entries, int inner, int32_t offset,
                int32_t* start, float* scaled) {
  const bool halves = l.group == 16, second = has_second(l);
  for (int64_t e = 0; e < entries; ++e, sums += 2 * inner, scale += inner) {
    for (int i = 0; i < (halves ? 2 : 1) * inner; ++i) {
      const int32_t sum = halves ? sums[i] : sums[i] + sums[inner + i];
      *start++ = offset * sum;
      if (second) *scaled++ = scale[i % inner] * float(sum);
    }
  }
}

// The scale of a row of k values, of those in 8 bits; all magnitudes below `threshold`.
float step_of(const Kernels& kernels, const Rounding& rounding, const float* x, int64_t k, float threshold) {
  return rounding.kind == kTensor ? rounding.value : kernels.largest_below(x, k, threshold) / 127.0f;
}

// From where on values are outliers.
float threshold_of(const Rounding& rounding) {
  return rounding.kind == kOutlier ? rounding.value : std::numeric_limits<float>::infinity();
}

// Bytes of a code, and of an activation, when many rows are multiplied by these codes.
int open_bytes(const Kernels& kernels, const Layout& l) { return kernels.widen && code_class(l.code) == 2 ? 2 : 1; }

// What dots begin with for every unit of sum q.
int32_t start_factor(const Kernels& kernels, const Layout& l) {
  return (l.second == kZero ? 0 : l.offset) - (code_class(l.code) == 2 ? kernels.signed_bias : 0);
}

// ---- Few rows ----

struct FineScratch {
  LargeVector<int8_t> codes;
  LargeVector<uint8_t> low;
  LargeVector<float> scale, scaled_sums;
  LargeVector<int32_t> sums, start;
  int64_t rows = 0, chunks = 0;

  void quantize(const Kernels& kernels, const Rounding& rounding, const float* x, int64_t n, int64_t columns,
                bool always_low) {
    rows = n;
    chunks = chunks_of(columns);
    int8_t* c = grown(codes, n * chunks * 64);
    uint8_t* has_low = grown(low, n * chunks);
    float* s = grown(scale, n * chunks);
    int32_t* q = grown(sums, n * chunks * 2);
    parallel_for(n, std::max<int64_t>(1, kMinMacs / 2 / columns), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* values = x + row * columns;
        int8_t* to = c + row * chunks * 64;
        if (rounding.kind == kGroups) {
          kernels.quantize_fine(values, columns, always_low, to, has_low + row * chunks, s + row * chunks,
                                q + row * chunks * 2);
        } else {
          const float step = step_of(kernels, rounding, values, columns, threshold_of(rounding));
          kernels.quantize_fine_row(values, columns, step, to, has_low + row * chunks, s + row * chunks,
                                    q + row * chunks * 2);
        }
      }
    });
  }

  FineActivations prepare(const Layout& l, int32_t offset) {
    int32_t* to = grown(start, rows * chunks * 2);
    float* scaled = grown(scaled_sums, rows * chunks * 2);
    scale_sums(l, sums.data(), scale.data(), rows * chunks, 1, offset, to, scaled);
    return {codes.data(), low.data(), scale.data(), to, scaled, chunks};
  }
};

// ---- Many rows ----

// Tiles of quantized rows, each with room for entries of outliers: one for each chunk, or two of kOutlier.
struct TileScratch {
  LargeVector<int8_t> codes, wide;  // wide: the same as int16, if `widened`
  bool widened = false;
  LargeVector<float> scale, scaled_sums;
  LargeVector<int32_t> sums, start, chunk;
  LargeVector<int64_t> entries;
  int64_t tiles = 0, room = 0;  // entries of a tile

  void quantize(const Kernels& kernels, const Rounding& rounding, const float* x, int64_t n, int64_t columns) {
    const int64_t chunks = chunks_of(columns);
    widened = false;
    tiles = (n + kTileRows - 1) / kTileRows;
    room = (rounding.kind == kOutlier ? 3 : 2) * chunks;
    int8_t* c = grown(codes, tiles * room * kChunk * kTileRows);
    float* s = grown(scale, tiles * room * kTileRows);
    int32_t* q = grown(sums, tiles * room * 2 * kTileRows);
    int32_t* at = grown(chunk, tiles * room);
    int64_t* count = grown(entries, tiles);
    parallel_for(tiles, std::max<int64_t>(1, kMinMacs / 2 / (columns * kTileRows)), [&](int64_t begin, int64_t end) {
      static thread_local LargeVector<float> own;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t rows = std::min<int64_t>(kTileRows, n - t * kTileRows), first = t * room;
        const float* values = x + t * kTileRows * columns;
        const TileBuffers to{c + first * kChunk * kTileRows, s + first * kTileRows, q + first * 2 * kTileRows,
                             at + first, grown(own, 2 * chunks + 32)};
        if (rounding.kind == kGroups) {
          count[t] = kernels.quantize_tile(values, columns, int(rows), columns, to);
          continue;
        }
        const float threshold = threshold_of(rounding);
        float steps[kTileRows];
        for (int64_t r = 0; r < rows; ++r)
          steps[r] = step_of(kernels, rounding, values + r * columns, columns, threshold);
        count[t] = kernels.quantize_tile_rows(values, columns, int(rows), columns, steps, threshold, to);
      }
    });
  }

  void prepare(const Kernels& kernels, const Layout& l) {
    const int32_t offset = start_factor(kernels, l);
    const bool widen = open_bytes(kernels, l) == 2 && !widened;
    int8_t* words = widen ? grown(wide, 2 * tiles * room * kChunk * kTileRows) : nullptr;
    widened |= widen;
    int32_t* to = grown(start, tiles * room * 2 * kTileRows);
    float* scaled = grown(scaled_sums, tiles * room * 2 * kTileRows);
    parallel_for(tiles, std::max<int64_t>(1, kMinMacs / 8 / (room * kTileRows)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * room * kTileRows;
        if (widen) kernels.widen(&codes[first * kChunk], entries[t] * kChunk * kTileRows, words + 2 * first * kChunk);
        scale_sums(l, &sums[2 * first], &scale[first], entries[t], kTileRows, offset, to + 2 * first,
                   scaled + 2 * first);
      }
    });
  }

  Tile tile(int64_t t, int bytes) const {
    const int64_t first = t * room, code = first * kChunk * kTileRows;
    return {bytes == 2 ? &wide[2 * code] : &codes[code],
            &scale[first * kTileRows],
            &start[first * 2 * kTileRows],
            &scaled_sums[first * 2 * kTileRows],
            &chunk[first],
            entries[t]};
  }
};

// An open panel in memory of its thread.
struct OpenScratch {
  LargeVector<uint8_t> codes;
  LargeVector<float> scale, second;

  OpenPanel room(const Layout& l, int64_t chunks, int bytes) {
    const int64_t scales = chunks * (l.group == 16 ? 32 : 16);
    return {grown(codes, chunks * 512 * bytes), grown(scale, scales), grown(second, scales)};
  }
};

// How many tiles one panel after the other is multiplied by before the next tiles come: so many as stay in a core's L2,
// but enough that opening a panel for each such block costs little.
int64_t tiles_held(int64_t columns, int bytes) {
  constexpr int64_t kHeldBytes = 256 << 10, kLeast = 16;
  return std::max(kLeast, kHeldBytes / (chunks_of(columns) * (kChunk * bytes + 12) * kTileRows));
}

void multiply_tiles(const Kernels& kernels, const Part& part, TileScratch& x, int64_t n, const Output& out) {
  const Layout& l = part.layout;
  const int kind = code_class(l.code), bytes = open_bytes(kernels, l);
  x.prepare(kernels, l);
  const TileKernel kernel = kernels.tile[kind][l.group == 16][has_second(l)];
  const int64_t most = tiles_held(part.columns, bytes), blocks = (x.tiles + most - 1) / most;
  const int64_t held = (x.tiles + blocks - 1) / blocks, panels = part.panel_count();
  parallel_for(blocks * panels, 1, [&](int64_t begin, int64_t end) {
    static thread_local OpenScratch scratch;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t panel = unit % panels, first = unit / panels * held, last = std::min(x.tiles, first + held);
      const OpenPanel open = scratch.room(l, chunks_of(part.columns), bytes);
      for (const bool low : {false, true}) {
        if (low && !part.low_table) break;
        kernels.open(low ? low_panel_of(part, panel) : panel_of(part, panel), open);
        for (int64_t t = first; t < last; t += kTilesHeld) {
          const int64_t count = std::min<int64_t>(kTilesHeld, last - t), row = t * kTileRows;
          Tile tiles[kTilesHeld];
          for (int64_t i = 0; i < count; ++i) tiles[i] = x.tile(t + i, bytes);
          kernel(open, tiles, int(std::min(count * kTileRows, n - row)),
                 low ? out.low_finish(part, panel, row) : out.finish(part, panel, row));
        }
      }
    }
  });
}

// ---- Floats ----

void multiply_floats(const Kernels& kernels, const Part& part, const float* x, int64_t n, const Output& out) {
  // The unit of work is kFloatPanels panels for one block of activation rows; their blocks follow each other.
  const int64_t blocks = (n + kMaxRows - 1) / kMaxRows, units = (part.panel_count() + kFloatPanels - 1) / kFloatPanels;
  const int64_t macs = part.columns * kPanelRows * kFloatPanels * std::min<int64_t>(n, kMaxRows);
  parallel_for(units * blocks, std::max<int64_t>(1, kMinMacs / macs), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t panel = unit / blocks * kFloatPanels, row = unit % blocks * kMaxRows;
      Finish finish = out.finish(part, panel, row);
      finish.rows = int(std::min<int64_t>(kPanelRows * kFloatPanels, part.rows - panel * kPanelRows));
      kernels.floating[part.floating](part.panels.data() + panel * part.panel_bytes, part.panel_bytes,
                                      int(std::min<int64_t>(kFloatPanels, part.panel_count() - panel)), part.columns,
                                      x + row * part.columns, part.columns, int(std::min<int64_t>(kMaxRows, n - row)),
                                      finish);
    }
  });
}

}  // namespace

int64_t Weight::nbytes() const {
  int64_t total = 0;
  for (const auto* each : {&parts, &apart}) {
    for (const Part& p : *each)
      total += p.panels.size() + 4 * int64_t(p.scale.size() + p.bias.size() + p.low_scale.size());
  }
  return total + 4 * int64_t(order.size());
}

std::string Weight::kernel() const {
  static const char* const kCodeNames[] = {"u1", "u2", "u3", "u4", "u5", "u6", "s8", "t4"};
  static const char* const kScaleNames[] = {"", "single", "super", "nibble"};
  static const char* const kSecondNames[] = {"", "min", "zero"};
  static const char* const kFloatNames[] = {"f32", "f16", "bf16", "e4m3"};
  std::string text = isa_name(active_isa());
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& p = parts[i];
    const Layout& l = p.layout;
    text.push_back(i == 0 ? ' ' : '+');
    if (p.integer)
      text.append(kCodeNames[l.code])
          .append(p.low_table ? "fine" : "")
          .append("x")
          .append(std::to_string(l.group))
          .append(kScaleNames[l.scales])
          .append(kSecondNames[l.second]);
    else
      text.append(kFloatNames[p.floating]);
  }
  for (const Part& p : apart)
    text.append("&").append(kFloatNames[p.floating]).append("x").append(std::to_string(p.columns));
  static const char* const kRoundingNames[] = {"", " by token", " by tensor", " outliers apart"};
  if (std::any_of(parts.begin(), parts.end(), [](const Part& p) { return p.integer; }))
    text.append(kRoundingNames[rounding.kind]);
  return text;
}

namespace {

// The columns [first, first + count) of x in this order, (n, count). x: (n, all columns of the order).
const float* gather(const float* x, int64_t n, const std::vector<int32_t>& order, int64_t first, int64_t count,
                    LargeVector<float>& out) {
  const auto columns = int64_t(order.size());
  float* to = grown(out, n * count);
  parallel_for(n, std::max<int64_t>(1, kGatherValues / count), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < count; ++k) to[i * count + k] = x[i * columns + order[first + k]];
    }
  });
  return to;
}

// Panels that a thread takes at least: worth its waking, and such that the threads' shares do not differ by one such
// piece.
int64_t even_grain(int64_t panels, int64_t macs) {
  const int64_t worth = std::max<int64_t>(1, panels * macs / kMinMacs);
  const int64_t pieces = worth > threads() ? worth - worth % threads() : worth;
  return std::max<int64_t>(1, (panels + pieces - 1) / pieces);
}

// y = the parts' product, of x (n, columns of the parts).
void multiply_parts(const float* x, int64_t n, const Weight& weight, const float* residual, float* y) {
  const int64_t columns = weight.inner();
  static thread_local FineScratch fine_scratch;
  static thread_local TileScratch tile_scratch;
  static thread_local MatrixScratch one_part, all_parts;
  const Kernels& kernels = active_kernels();
  const bool integer = std::any_of(weight.parts.begin(), weight.parts.end(), [](const Part& p) { return p.integer; });
  const auto part_output = [&](int64_t first_row, int64_t part_row) {
    const int64_t at = first_row * weight.rows + part_row;
    return Output{residual ? residual + at : nullptr, y + at, weight.rows};
  };
  if (n <= kFineRows && weight.rounding.kind != kOutlier) {
    int64_t row = 0;
    int quantized = -1;  // for parts of few bits (0) or more (1)
    for (const Part& part : weight.parts) {
      const Output out = part_output(0, row);
      row += part.rows;
      if (!part.integer) {
        multiply_floats(kernels, part, x, n, out);
        continue;
      }
      const int fine_bits = code_bits(part.layout.code) > kCoarseBits;
      if (fine_bits != quantized) fine_scratch.quantize(kernels, weight.rounding, x, n, columns, fine_bits);
      quantized = fine_bits;
      const FineActivations fine = fine_scratch.prepare(part.layout, start_factor(kernels, part.layout));
      const int64_t macs = part.columns * kPanelRows * n;
      parallel_for(part.panel_count(), even_grain(part.panel_count(), macs), [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          kernels.fine(panel_of(part, panel), fine, int(n), out.finish(part, panel, 0));
          if (part.low_table) kernels.fine(low_panel_of(part, panel), fine, int(n), out.low_finish(part, panel, 0));
        }
      });
    }
    return;
  }
  const MatrixKernels* matrix = n > kFineRows ? matrix_kernels() : nullptr;
  const MatrixKernels* integer_matrix = weight.rounding.kind == kGroups ? matrix : nullptr;
  const bool floating = std::any_of(weight.parts.begin(), weight.parts.end(), [](const Part& p) { return !p.integer; });
  const int64_t most =
      matrix ? kMatrixRows * kMatrixTiles
             : std::max<int64_t>(1, kActivationBytes / ((integer ? 1 : 4) * columns) / kMaxRows) * kMaxRows;
  for (int64_t first = 0; first < n; first += most) {
    const int64_t rows = std::min(most, n - first);
    const float* x_chunk = x + first * columns;
    if (matrix && floating) all_parts.round(*matrix, x_chunk, rows, columns, true);
    if (integer && integer_matrix)
      one_part.round(*matrix, x_chunk, rows, columns, false);
    else if (integer)
      tile_scratch.quantize(kernels, weight.rounding, x_chunk, rows, columns);
    int64_t row = 0;
    for (const Part& part : weight.parts) {
      const Output out = part_output(first, row);
      row += part.rows;
      if (part.integer ? integer_matrix : matrix)
        multiply_matrix(*matrix, part, part.integer ? one_part : all_parts, rows, out);
      else if (!part.integer)
        multiply_floats(kernels, part, x_chunk, rows, out);
      else
        multiply_tiles(kernels, part, tile_scratch, rows, out);
    }
  }
}

}  // namespace

void multiply(const float* x, int64_t n, const Weight& weight, const float* residual, float* y) {
  static thread_local LargeVector<float> gathered, beside;
  if (weight.order.empty()) return multiply_parts(x, n, weight, residual, y);
  const int64_t columns = weight.inner();
  multiply_parts(gather(x, n, weight.order, 0, columns, gathered), n, weight, residual, y);
  for (const Part& part : weight.apart) {
    const float* values = gather(x, n, weight.order, columns, part.columns, beside);
    multiply_floats(active_kernels(), part, values, n, Output{y, y, weight.rows});
  }
}

void multiply_gated(const float* x, int64_t n, const Weight& weight, elementwise::Activation activation, float* y) {
  const int64_t width = weight.rows / 2;
  const MatrixKernels* matrix = n > kFineRows ? matrix_kernels() : nullptr;
  const Part* whole = weight.parts.size() == 1 && weight.order.empty() ? &weight.parts[0] : nullptr;
  if (matrix && whole && width % kPanelRows == 0 && (!whole->integer || weight.rounding.kind == kGroups)) {
    static thread_local MatrixScratch scratch;
    constexpr int64_t kMost = kMatrixRows * kMatrixTiles;
    for (int64_t first = 0; first < n; first += kMost) {
      const int64_t rows = std::min(kMost, n - first);
      scratch.round(*matrix, x + first * weight.columns, rows, weight.columns, !whole->integer);
      multiply_matrix(*matrix, *whole, scratch, rows, Output{nullptr, y + first * width, width}, &activation);
    }
    return;
  }
  static thread_local LargeVector<float> both;
  float* halves = grown(both, n * weight.rows);
  multiply(x, n, weight, nullptr, halves);
  elementwise::gated(halves, n, width, activation, y);
}

}  // namespace tersor::linear
