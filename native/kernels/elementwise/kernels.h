// The ops that touch every value once: what every instruction set provides. Rows are contiguous; d is any length.
#pragma once

#include <cstdint>

#include "base/kernel_tables.h"

namespace tersor::elementwise {

enum Activation { kSilu, kGeluTanh };

struct Kernels {
  // y = x / sqrt(mean(x^2) + eps) * weight, over d values. y may be x.
  void (*rms_norm)(const float* x, int64_t d, const float* weight, float eps, float* y);
  // y = act(gate) * up, n values
  void (*gated)(const float* gate, const float* up, int64_t n, Activation activation, float* y);
  // x += y
  void (*add)(float* x, const float* y, int64_t n);
  // x = cap * tanh(x / cap)
  void (*softcap)(float* x, int64_t n, float cap);
  // Rotates the pairs (i, i + half) of one head by the angles whose cosines and sines are given: (half) each.
  void (*rotate)(float* x, int64_t half, const float* cosines, const float* sines);
};

TERSOR_KERNEL_TABLES

}  // namespace tersor::elementwise
