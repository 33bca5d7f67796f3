// The weight layout of `linear` and the kernels that every instruction set provides for it.
//
// A weight matrix (rows, k) is stored as panels of 16 output rows, each contiguous, in the order in which it is read:
//
//   float panel:    w[k][16], as float32, float16 or bfloat16
//   integer panel:  blocks of 256 columns, the last one of fewer (a multiple of 32; k is padded with zeros):
//                     chunks of 32 columns, each bits * 64 bytes of bit planes (below)
//                     scales of all groups of the block (Scales, below)
//
// A chunk is 8 steps of 16 rows x 4 columns; byte row*4 + j of a step is column j. Planes are lines of 64 bytes:
//   4-bit line: steps 2i, 2i+1 in the low and the high nibbles       kU4, kT4: four lines
//   2-bit line: steps 4i .. 4i+3, from the low bits up               kU2: two
//   1-bit line: steps 0 .. 7, from the low bit up                    kU1: one
//   a step a line                                                    kS8: eight
// kU3 is two 2-bit lines and a 1-bit line of bit 2; kU5 four 4-bit lines and a 1-bit line of bit 4; kU6 four 4-bit
// lines and two 2-bit lines of bits 4 and 5.
#pragma once

#include <cstdint>

#include "base/float16.h"
#include "base/kernel_tables.h"
#include "kernels/elementwise/elementwise.h"

namespace tersor::linear {

inline constexpr int kPanelRows = 16;
inline constexpr int kChunk = 32;  // columns of a chunk; activations share a scale within it
inline constexpr int kBlockColumns = 256;
inline constexpr int kBlockChunks = kBlockColumns / kChunk;
inline constexpr int kFloatPanels = 4;  // panels of one call of a float kernel
inline constexpr int kMaxRows = 96;     // activation rows of one call of a float kernel
inline constexpr int kFineRows = 16;    // up to so many activation rows are quantized to 15 bits, more to 8 bits
inline constexpr int kCoarseBits = 2;   // codes of so many bits or fewer see 15 bits in outliers only
inline constexpr int kTilesHeld = 4;    // tiles of one call of a kernel
inline constexpr int kTileRows = 8;     // rows of a tile of 8-bit activations; a multiple of every register tile

// How a code becomes an integer. kU1: 0 or 2; kU2 .. kU6: unsigned; kS8: -128..127; kT4: table of 16 int8.
enum Code { kU1, kU2, kU3, kU4, kU5, kU6, kS8, kT4, kCodes };
static constexpr int code_bits(Code code) { return code == kS8 ? 8 : code == kT4 ? 4 : code + 1; }

// How the scales of a block lie, each for 16 rows, group after group.
//   kHalves:  float16 scale of every group; then as `second` says float16 minimum, or uint8 zero point, of every group
//   kSingles: the same with float32 in float16's place
//   kSuper:   float16 d [and float16 dmin]; int8 sub of every group [then uint8 of its minimum]: scale = d * sub,
//             minimum = -dmin * submin
//   kNibbles: float16 d, float16 dmin; a byte of every group: low nibble of the scale, high of the minimum
enum Scales { kHalves, kSingles, kSuper, kNibbles, kScaleKinds };
static constexpr bool per_group(Scales scales) { return scales == kHalves || scales == kSingles; }

// What there is beside the scale. kNone: w = scale * (code + offset)   kMin: w = scale * (code + offset) + minimum
//                                 kZero: w = scale * (code + offset - zero)
enum Second { kNone, kMin, kZero, kSeconds };

// The number format of a panel.
struct Layout {
  Code code;
  Scales scales;
  Second second;
  int group;  // columns that share a scale: 16, 32, 64, 128 or 256
  int offset;
  const int8_t* table;  // of kT4, else null

  bool operator==(const Layout&) const = default;
};

// Static, so that every instruction set has its own: of a block's or a panel's columns, a multiple of 32.
static constexpr int group_count(const Layout& l, int64_t columns) { return int((columns + l.group - 1) / l.group); }
static constexpr int64_t code_bytes(const Layout& l, int64_t columns) { return columns * 2 * code_bits(l.code); }
static constexpr int64_t scale_bytes(const Layout& l, int64_t columns) {
  const int floats = l.scales == kSingles ? 64 : 32;  // bytes of 16
  const int of_group = per_group(l.scales)  ? floats + (l.second == kNone  ? 0
                                                        : l.second == kMin ? floats
                                                                           : 16)
                       : l.scales == kSuper ? (l.second == kNone ? 16 : 32)
                                            : 16;
  const int of_block = per_group(l.scales) ? 0 : l.scales == kSuper && l.second == kNone ? 32 : 64;
  return of_block + int64_t(group_count(l, columns)) * of_group;
}
static constexpr int64_t block_bytes(const Layout& l, int64_t columns) {
  return code_bytes(l, columns) + scale_bytes(l, columns);
}
static constexpr int64_t panel_bytes(const Layout& l, int64_t columns) {
  const int64_t rest = columns % kBlockColumns;
  return columns / kBlockColumns * block_bytes(l, kBlockColumns) + (rest ? block_bytes(l, rest) : 0);
}

struct IntegerPanel {
  const uint8_t* blocks;
  int64_t chunks;  // of 32 columns
  Layout layout;
};

// How activations become integers.
//   kGroups:  a scale for every row and 32 columns, 15 bits where it matters (generic_quantize.h)
//   kToken:   one for a row, absmax / 127
//   kTensor:  the same for all rows, given beforehand; what is beyond 127 steps is cut off
//   kOutlier: of a row, values of magnitude `threshold` and more in 15 bits, one scale per 32 columns; the others in 8,
//             one scale, their absmax / 127 (LLM.int8(), arXiv 2208.07339, section 3.2, a token being the matrix)
enum RoundingKind { kGroups, kToken, kTensor, kOutlier };
struct Rounding {
  RoundingKind kind = kGroups;
  float value = 0;  // of kTensor the scale, of kOutlier the threshold
};

// Activations of up to kFineRows rows, per 32 columns: x ~ scale * q, q = 128 * high + low in [-16256, 16256]. Without
// low codes q is 128 times an 8-bit integer.
struct FineActivations {
  const int8_t* codes;   // (rows, chunks, 64): 32 high codes, then 32 low ones
  const uint8_t* low;    // (rows, chunks): whether there are low ones
  const float* scale;    // (rows, chunks), max|x| / 16256
  const int32_t* start;  // (rows, chunks), or (rows, chunks, 2) when groups are of 16: offset * sum q
  const float* sums;     // like start: scale * sum q; for layouts with a minimum
  int64_t chunks;
};

// Activations of one tile of kTileRows rows, in the order in which they are read. Entry e < chunks is chunk e in 8
// bits: x ~ scale * q, scale = max|x| / 127. The entries that follow are the second 8 bits of chunks that hold outliers
// of some row (the other rows are 0 there), scale = max|x| / 16256; of kOutlier both 8 bits of the outliers alone.
struct Tile {
  const int8_t* codes;   // (entries, 32 / kStepColumns, kTileRows, kStepColumns); as int16 where the panel's codes are
  const float* scale;    // (entries, kTileRows)
  const int32_t* start;  // (entries, kTileRows), or (entries, 2, kTileRows) when groups are of 16: what dots begin with
  const float* sums;     // like start: scale * sum q; for layouts with a minimum
  const int32_t* chunk;  // (entries)
  int64_t entries;
};

// Where a tile is quantized to: as in Tile; sums (entries, 2, kTileRows) is of q over each half of the 32 columns.
struct TileBuffers {
  int8_t* codes;
  float* scale;
  int32_t* sums;
  int32_t* chunk;
  float* scratch;  // (2 * chunks rounded up to multiples of 16)
};

// A panel whose codes are bytes and whose scales are float32: what many activation rows are multiplied by.
struct OpenPanel {
  uint8_t* codes;  // (chunks, 8 steps, 64), or two steps joined to (16, 8); where the kernels widen, signed as int16
  float* scale;    // (chunks, 16), or (chunks, 2, 16) when groups are of 16
  float* second;   // like scale; minima; null when there are none
};

// What a kernel does with the sums (n, 16) of one panel: y = sums * scale + bias + residual.
struct Finish {
  const float* scale;     // (16)
  const float* bias;      // (16) or null
  const float* residual;  // like y, or null
  float* y;               // (n, stride), at the panel's first row
  int64_t stride;
  int rows;  // of the panel that exist, 1..16
};

// The panel times n rows, 1 <= n <= kFineRows.
using FineKernel = void (*)(const IntegerPanel& panel, const FineActivations& x, int n, const Finish& finish);
// The panel times the first n rows of some tiles, 1 <= n <= kTilesHeld * kTileRows.
using TileKernel = void (*)(const OpenPanel& panel, const Tile* tiles, int n, const Finish& finish);
// Some panels, up to kFloatPanels, panel_bytes apart, times n rows, 1 <= n <= kMaxRows; finish is of the first, but
// counts the rows of all.
using FloatKernel = void (*)(const void* panels, int64_t panel_bytes, int count, int64_t k, const float* x,
                             int64_t stride, int n, const Finish& finish);

struct Kernels {
  // Quantizes one row of k values; the padding becomes 0. sums (chunks, 2). always_low: all chunks get low codes, not
  // only those that hold outliers.
  void (*quantize_fine)(const float* x, int64_t k, bool always_low, int8_t* codes, uint8_t* low, float* scale,
                        int32_t* sums);
  // Quantizes n <= kTileRows rows of k values, x with `stride` values between rows; the rows that miss become 0.
  // Returns the entries, at most 2 * chunks.
  int64_t (*quantize_tile)(const float* x, int64_t stride, int n, int64_t k, const TileBuffers& to);
  // The same with one scale for the row, in 8 bits, cut off at 127 of them.
  void (*quantize_fine_row)(const float* x, int64_t k, float step, int8_t* codes, uint8_t* low, float* scale,
                            int32_t* sums);
  // The same with the scale of each row, and values from `threshold` on apart. At most 3 * chunks entries.
  int64_t (*quantize_tile_rows)(const float* x, int64_t stride, int n, int64_t k, const float* steps, float threshold,
                                const TileBuffers& to);
  // The largest magnitude below the threshold of k values.
  float (*largest_below)(const float* x, int64_t k, float threshold);
  FineKernel fine;
  // Activations of a tile, n codes, to int16, where signed codes (class 2) are multiplied as such; else null.
  void (*widen)(const int8_t* codes, int64_t n, int8_t* to);
  int signed_bias;  // what `open` adds to signed codes (class 2); Tile::start makes up for it
  void (*open)(const IntegerPanel& panel, const OpenPanel& out);
  TileKernel tile[3][2][2];  // [code_class][group == 16][minima]
  FloatKernel floating[kFloats];
};

// Codes by what a dot product must hold: up to 4 bits, up to 6 bits, signed bytes.
static constexpr int code_class(Code code) { return code <= kU4 ? 0 : code <= kU6 ? 1 : 2; }

// A minimum or a zero point makes the kernels add second * sum of the activations.
static constexpr bool has_second(const Layout& layout) { return layout.second != kNone; }

TERSOR_BYTE_KERNEL_TABLES
TERSOR_TILE_KERNEL_TABLE

// ---- Products by matrix tiles of bfloat16, on CPUs that have them, in place of TileKernel and FloatKernel ----

inline constexpr int kMatrixRows = 16;    // activation rows of a tile
inline constexpr int kMatrixPanels = 16;  // panels of one call, at most
inline constexpr int kMatrixTiles = 32;   // tiles of rows of one call, at most
inline constexpr int kMatrixParts = 3;    // bfloat16 that a float32 is the sum of

// Columns that are multiplied before the next come, in chunks: `least` of them, and more at the end.
struct MatrixBlock {
  int64_t first, chunks;
};
struct MatrixBlocks {
  int64_t chunks, least;

  constexpr int64_t count() const { return chunks < least ? 1 : chunks / least; }
  constexpr MatrixBlock at(int64_t b) const { return {b * least, b + 1 < count() ? least : chunks - b * least}; }
};
// Of activations in one part, or in all of them.
static constexpr MatrixBlocks matrix_blocks(int64_t chunks, int parts) {
  return {chunks, parts == 1 ? kBlockChunks : kBlockChunks / 2};
}

// Activations as bfloat16: (blocks, tiles of 16 rows, chunks of the block, parts, 16, 32); what is missing is 0.
struct MatrixRows {
  const uint16_t* tiles;
  int64_t count;  // of tiles of rows
};

// Panels of one call, `bytes` apart. With `up`, each is of gates, and what it gates is so many panels on: outputs are
// act(gate) * up, as many as there are gates. Finishes are of the first panel, but count the rows of all gates.
struct MatrixPanels {
  const uint8_t* first;
  int64_t bytes;
  int count;
  int64_t up = 0;
  elementwise::Activation activation = elementwise::kSilu;

  // The i-th of all in the order of their products, where each gate is followed by what it gates.
  constexpr int products() const { return up ? 2 * count : count; }
  const uint8_t* at(int64_t i) const { return first + (up ? i / 2 + i % 2 * up : i) * bytes; }
};

struct MatrixKernels {
  // Rounds n <= kMatrixRows rows of k values to tile number `tile` of `tiles`: [0] to one part, [1] to kMatrixParts.
  void (*round[2])(const float* x, int64_t stride, int n, int64_t k, int64_t tile, int64_t tiles, uint16_t* to);
  // Some panels of integers, whose products are up to kMatrixPanels, times n rows. low_table: of tables finer than 8
  // bits, else null. sums: (products rounded up to even, n rounded up to 32, 16).
  void (*multiply)(const MatrixPanels& panels, const Layout& layout, int64_t chunks, const int8_t* low_table,
                   const MatrixRows& x, int64_t n, const Finish& finish, float* sums);
  // The same of floats, of k columns, and activations in all parts: about as exact as FloatKernel.
  void (*floating[kFloats])(const MatrixPanels& panels, int64_t k, const MatrixRows& x, int64_t n, const Finish& finish,
                            float* sums);
};

#ifdef TERSOR_HAS_AMX
extern const MatrixKernels amx_matrix_kernels;
#endif

}  // namespace tersor::linear
