// Products of many activation rows by matrix tiles of bfloat16 (MatrixKernels). Include after base/simd/amx.h.
//
// With integers both sides are rounded to bfloat16, 8 significant bits: each factor is off by at most 2^-8 of itself.
// Floats are sums of up to three bfloat16, which hold a float32 exactly. Sums are float32, over k in ascending order.
// Column block by column block, pairs of panels are decoded into the first cache and multiplied by all rows; the sums
// wait in the second one.
#pragma once

#include "base/simd/math.h"
#include "base/simd/product.h"
#include "base/simd/tile_product.h"
#include "kernels/linear/generic_codes.h"
#include "kernels/linear/generic_finish.h"

namespace tersor::linear {
namespace {

static_assert(kMatrixParts == kFloatParts);

// ---- Activations ----

template <int kParts>
void round_rows(const float* x, int64_t stride, int n, int64_t k, int64_t tile, int64_t tiles, uint16_t* to) {
  const MatrixBlocks blocks = matrix_blocks((k + kChunk - 1) / kChunk, kParts);
  for (int64_t b = 0; b < blocks.count(); ++b) {
    const MatrixBlock block = blocks.at(b);
    uint16_t* out = to + kParts * kTile * (block.first * tiles + tile * block.chunks);
    for (int64_t c = block.first; c < block.first + block.chunks; ++c, out += kParts * kTile) {
      for (int row = 0; row < kMatrixRows; ++row) {
        const float* values = x + row * stride + kChunk * c;
        const int64_t left = row < n ? k - kChunk * c : 0;
        store_parts<kParts>(out + 32 * row, load_least(values, left), load_least(values + 16, left - 16));
      }
    }
  }
}

// ---- Weights ----

// The codes of step I of a chunk as floats, column by column: w = scale * code + base.
template <Code kCode, int I, int kColumn>
inline F code_floats(const uint8_t* p, const F& table) {
  if constexpr (kCode == kU4 || kCode == kT4)
    return lookup_float(table, shifted_right<8 * kColumn + 4 * (I % 2)>(load_codes(p + 64 * (I / 2))));
  else
    return to_float(column_of<kColumn>(step_codes<kCode, I>(p, Table{})));
}

template <Code kCode, int I, int kEnd>
inline void decode_steps(const uint8_t* p, const F& table, const F& scale, const F& base, uint16_t* out) {
  if constexpr (I < kEnd) {
    const auto column = [&](auto floats) { return fma(floats, scale, base); };
    store_halves(out + 64 * I, paired(to_bf16(column(code_floats<kCode, I, 0>(p, table)),
                                              column(code_floats<kCode, I, 1>(p, table)))));
    store_halves(out + 64 * I + 32, paired(to_bf16(column(code_floats<kCode, I, 2>(p, table)),
                                                   column(code_floats<kCode, I, 3>(p, table)))));
    decode_steps<kCode, I + 1, kEnd>(p, table, scale, base, out);
  }
}

// Scales and what is added to scale * code, of every group of some columns, 16 rows each.
struct GroupScales {
  alignas(64) float scale[16 * 16], base[16 * 16];
};

inline constexpr int kTilesApart = kPanelsHeld * kTile;  // from a chunk of integers to the next

// Chunks of one block of the layout, each to a tile.
template <Code kCode>
void decode_chunks(const uint8_t* p, int64_t chunks, int group, const F& table, const GroupScales& s, uint16_t* out) {
  for (int64_t c = 0; c < chunks; ++c, p += 64 * code_bits(kCode), out += kTilesApart) {
    if (group == 16) {
      decode_steps<kCode, 0, 4>(p, table, load(s.scale + 32 * c), load(s.base + 32 * c), out);
      decode_steps<kCode, 4, 8>(p, table, load(s.scale + 32 * c + 16), load(s.base + 32 * c + 16), out);
    } else {
      const int64_t g = 16 * (c * kChunk / group);
      decode_steps<kCode, 0, 8>(p, table, load(s.scale + g), load(s.base + g), out);
    }
  }
}

using DecodeChunks = void (*)(const uint8_t* p, int64_t chunks, int group, const F& table, const GroupScales& s,
                              uint16_t* out);
const DecodeChunks kDecodeChunks[kCodes] = {decode_chunks<kU1>, decode_chunks<kU2>, decode_chunks<kU3>,
                                            decode_chunks<kU4>, decode_chunks<kU5>, decode_chunks<kU6>,
                                            decode_chunks<kS8>, decode_chunks<kT4>};

// What a code of 4 bits stands for, before scale and offset.
inline F code_table(const Layout& l, const int8_t* low_table) {
  float values[16];
  for (int i = 0; i < 16; ++i)
    values[i] = l.code == kT4 ? float(l.table[i]) + (low_table ? float(low_table[i]) / 128 : 0) : float(i);
  return load(values);
}

// Chunks [first, first + chunks) of a panel, first at the beginning of a block of the layout.
void decode_columns(const IntegerPanel& panel, const F& table, int64_t first, int64_t chunks, uint16_t* out) {
  const Layout& l = panel.layout;
  const F offset = set(float((l.second == kZero ? 0 : l.offset) - (l.code == kS8 ? kSignedBias : 0)));
  const uint8_t* p = panel.blocks + first / kBlockChunks * block_bytes(l, kBlockColumns);
  GroupScales s;
  for (int64_t done = 0; done < chunks; done += kBlockChunks) {
    const int64_t count = chunks - done < kBlockChunks ? chunks - done : kBlockChunks, columns = kChunk * count;
    const uint8_t* scales = p + code_bytes(l, columns);
    expand_scales(l, scales, columns, s.scale, s.base);
    for (int g = 0; g < group_count(l, columns); ++g) {
      const F shift = mul(offset, load(s.scale + 16 * g));
      store(s.base + 16 * g, has_second(l) ? add(shift, load(s.base + 16 * g)) : shift);
    }
    kDecodeChunks[l.code](p, count, l.group, table, s, out + kTilesApart * done);
    p = scales + scale_bytes(l, columns);
  }
}

// Columns of a panel of floats, w[k][16], in kParts parts each; those that miss are 0.
template <Float kFloat, int kParts>
void decode_floats(const void* panel, int64_t k, const MatrixBlock& block, uint16_t* out) {
  for (int64_t c = block.first; c < block.first + block.chunks; ++c, out += kPanelsHeld * kParts * kTile) {
    for (int64_t i = kChunk * c; i < kChunk * (c + 1); i += 2) {
      const F x = i < k ? load_as<kFloat>(panel, 16 * i) : zero(),
              y = i + 1 < k ? load_as<kFloat>(panel, 16 * i + 16) : zero();
      store_paired_parts<kParts>(out + 16 * (i - kChunk * c), x, y);
    }
  }
}

// ---- Products ----

// Asks the outer cache for what is decoded next, a share at a time, while something else is computed: some bytes of
// each panel, which the CPU does not foresee. There may be one panel, or none: asking for no memory does nothing.
class Ahead {
 public:
  Ahead(const MatrixPanels& panels, int first, int64_t offset, int64_t bytes, int64_t shares)
      : at_{panels.at(first) + offset, panels.at(first + 1) + offset},
        lines_(bytes / 64 + 1),
        share_((2 * lines_ + shares - 1) / shares) {}
  void next_share() {
    for (const int64_t end = done_ + share_ < 2 * lines_ ? done_ + share_ : 2 * lines_; done_ < end; ++done_)
      __builtin_prefetch(at_[done_ >= lines_] + done_ % lines_ * 64, 0, 2);
  }

 private:
  const uint8_t* at_[kPanelsHeld];
  int64_t lines_, share_, done_ = 0;
};

// One or two panels, decoded, times all rows.
template <int N, int X, int W>
void multiply_rows(const MatrixRows& x, const MatrixBlock& block, const uint16_t* w, bool begin, float* sums,
                   Ahead& ahead) {
  const int64_t x_tile = X * kTile * block.chunks;
  const uint16_t* tiles = x.tiles + X * kTile * block.first * x.count;
  int64_t t = 0;
  for (; t + 2 <= x.count; t += 2, sums += 1024) {
    ahead.next_share();
    multiply_block<2, N, X, W>(tiles + t * x_tile, x_tile, w, block.chunks, begin, sums);
  }
  if (t < x.count) multiply_block<1, N, X, W>(tiles + t * x_tile, x_tile, w, block.chunks, begin, sums);
}

// Asks for what a row's outputs are added to and written to: another thread may have it, or wrote it last. Inlined
// always: GCC may take a call of this for one without effect and drop it.
[[gnu::always_inline]] inline void ask_for_outputs(const Finish& finish, int64_t row) {
  const int64_t at = row * finish.stride;
  for (int i = 0; i < finish.rows; i += kPanelRows) {
    __builtin_prefetch(finish.y + at + i, 1);
    if (finish.residual) __builtin_prefetch(finish.residual + at + i, 0);
  }
}

// The outputs of one row, from its sums of all panels, pairs of which are pair_sums apart.
inline void finish_panels(const MatrixPanels& panels, const float* sums, int64_t pair_sums, const Finish& finish,
                          int64_t row) {
  const float* from = sums + row / 32 * 1024 + row / 16 % 2 * 512 + row % 16 * 16;
  if (!panels.up) {
    for (int p = 0; p < panels.count; p += kPanelsHeld, from += pair_sums) {
      finish_row(load(from), finish, row, p * kPanelRows);
      if (p + 1 < panels.count) finish_row(load(from + 256), finish, row, (p + 1) * kPanelRows);
    }
    return;
  }
  float* y = finish.y + row * finish.stride;
  for (int at = 0; at < panels.count * kPanelRows; at += kPanelRows, from += pair_sums) {
    const F gate = scaled(load(from), finish, at), up = scaled(load(from + 256), finish, at + panels.up * kPanelRows);
    store(y + at, mul(panels.activation == elementwise::kSilu ? silu(gate) : gelu_tanh(gate), up));
  }
}

// Panels times n rows. bytes_of(chunks): of so many in a panel; decode(panel, block, to) writes the tiles of a block.
template <int X, int W, typename BytesOf, typename Decode>
void multiply_panels(const MatrixPanels& panels, const MatrixBlocks& blocks, const MatrixRows& x, int64_t n,
                     const Finish& finish, float* sums, BytesOf bytes_of, Decode decode) {
  [[maybe_unused]] const TilesInUse in_use;
  constexpr int kMost = 2 * (X == 1 ? kBlockChunks : kBlockChunks / 2) - 1;  // chunks of a block
  alignas(64) uint16_t w[kMost * kPanelsHeld * W * kTile];
  const int count = panels.products();
  const int64_t row_pairs = (x.count + 1) / 2, pair_sums = 1024 * row_pairs;
  for (int64_t b = 0; b < blocks.count(); ++b) {
    const MatrixBlock block = blocks.at(b);
    for (int p = 0; p < count; p += kPanelsHeld) {
      const int held = count - p < kPanelsHeld ? count - p : kPanelsHeld;
      for (int i = 0; i < held; ++i) decode(panels.at(p + i), block, w + i * W * kTile);
      // What comes next: the next panels, the first ones of the next block, or those after these, if there are any.
      const int next = p + kPanelsHeld < count ? p + kPanelsHeld : b + 1 < blocks.count() ? 0 : count;
      const MatrixBlock next_block = next > p && next < count ? block : blocks.at((b + 1) % blocks.count());
      Ahead ahead(panels, next, bytes_of(next_block.first), bytes_of(next_block.chunks), row_pairs);
      (held == 2 ? multiply_rows<2, X, W> : multiply_rows<1, X, W>)(x, block, w, b == 0,
                                                                    sums + p / kPanelsHeld * pair_sums, ahead);
    }
  }
  constexpr int64_t kAheadRows = 4;
  for (int64_t row = 0; row < n; ++row) {
    if (row + kAheadRows < n) ask_for_outputs(finish, row + kAheadRows);
    finish_panels(panels, sums, pair_sums, finish, row);
  }
}

void matrix(const MatrixPanels& panels, const Layout& layout, int64_t chunks, const int8_t* low_table,
            const MatrixRows& x, int64_t n, const Finish& finish, float* sums) {
  const F table = code_table(layout, low_table);
  multiply_panels<1, 1>(
      panels, matrix_blocks(chunks, 1), x, n, finish, sums,
      [&](int64_t some) { return panel_bytes(layout, kChunk * some); },
      [&](const uint8_t* panel, const MatrixBlock& block, uint16_t* to) {
        decode_columns({panel, chunks, layout}, table, block.first, block.chunks, to);
      });
}

template <Float kFloat>
void matrix_floats(const MatrixPanels& panels, int64_t k, const MatrixRows& x, int64_t n, const Finish& finish,
                   float* sums) {
  constexpr int kParts = kFloat == kF32 ? 3 : kFloat == kF16 ? 2 : 1;  // that hold such a float exactly
  multiply_panels<kMatrixParts, kParts>(
      panels, matrix_blocks((k + kChunk - 1) / kChunk, kMatrixParts), x, n, finish, sums,
      [&](int64_t some) { return kChunk * some * 16 * float_bytes(kFloat); },
      [&](const uint8_t* panel, const MatrixBlock& block, uint16_t* to) {
        decode_floats<kFloat, kParts>(panel, k, block, to);
      });
}

#define TERSOR_MATRIX_KERNELS                                                              \
  {                                                                                        \
    {round_rows<1>, round_rows<kMatrixParts>}, matrix, {                                   \
      matrix_floats<kF32>, matrix_floats<kF16>, matrix_floats<kBF16>, matrix_floats<kE4M3> \
    }                                                                                      \
  }

}  // namespace
}  // namespace tersor::linear
