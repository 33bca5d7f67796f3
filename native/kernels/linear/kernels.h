// The weight layout of `linear` and the kernels that every instruction set provides for it.
//
// A weight matrix (rows, k) is stored as panels of 16 output rows, each contiguous, in the order in which it is read:
//
//   float panel:    w[k][16], as float32, float16 or bfloat16
//   integer panel:  per group of 16 or 32 columns one block
//                     codes:  k4-steps of 16 rows x 4 columns: byte row*4 + j is column j of the step (8-bit codes), or
//                             lines of two such steps: byte = second step << 4 | first step (4-bit codes)
//                     scale:  float16[16]
//                     second: float16[16], a minimum or a zero point, if the scheme has one
//
// Activations of integer panels are quantized per 32 columns: x ~ scale * q, q in [-127, 127], scale = max|x| / 127.
// k is padded with zeros to a multiple of 32.
#pragma once

#include <cstdint>

#include "base/float16.h"

namespace tersor::linear {

inline constexpr int kPanelRows = 16;
inline constexpr int kActivationGroup = 32;  // columns that share an activation scale
inline constexpr int kMaxRows = 96;          // activation rows of one kernel call; a multiple of every register tile

// How a code becomes an integer. kU4: 0..15, two in a byte; kU6: 0..63; kS8: -128..127; kT4: table of 16 int8, two in a
// byte.
enum Code { kU4, kU6, kS8, kT4, kCodes };

// What `second` holds.   kNone: w = scale * (code + offset)   kMin: w = scale * (code + offset) + second
//                        kZero: w = scale * (code + offset - second)
enum Second { kNone, kMin, kZero, kSeconds };

constexpr int code_bytes(Code code) { return code == kU4 || code == kT4 ? 8 : 16; }  // per column of a panel

constexpr int block_bytes(Code code, int group, Second second) {
  return code_bytes(code) * group + 2 * kPanelRows * (second == kNone ? 1 : 2);
}

struct IntegerPanel {
  const uint8_t* blocks;
  int64_t groups;
  float offset;         // an integer; 0 for signed codes (kS8, kT4) with kNone
  const int8_t* table;  // of kT4, else null
};

// Quantized activations, row by row. sums are exact integers: of 32 columns, and of 16.
struct Activations {
  const int8_t* codes;   // (rows, 32 * groups)
  const float* scale;    // (rows, groups)
  const float* sums[2];  // [0]: per 16 columns (rows, 2 * groups), [1]: per 32 columns (rows, groups)
  int64_t groups;

  Activations from_row(int64_t row) const {
    return {
        codes + row * 32 * groups, scale + row * groups, {sums[0] + row * 2 * groups, sums[1] + row * groups}, groups};
  }
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

// Each computes the panel for the first n activation rows, 1 <= n <= kMaxRows.
using IntegerKernel = void (*)(const IntegerPanel& panel, const Activations& x, int n, const Finish& finish);
using FloatKernel = void (*)(const void* panel, int64_t k, const float* x, int64_t stride, int n, const Finish& finish);

struct Kernels {
  // Quantizes one row of k values into codes (32 * groups), scale and sums; the padding becomes 0.
  void (*quantize)(const float* x, int64_t k, int8_t* codes, float* scale, float* sums16, float* sums32);
  IntegerKernel integer[kCodes][2][kSeconds];  // [code][group == 32][second]
  FloatKernel floating[kFloats];
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512vnni_kernels;
#elif defined(__aarch64__)
extern const Kernels neondot_kernels;
#endif

}  // namespace tersor::linear
