// Attention of one query to keys and values in plain rows: what every instruction set provides.
#pragma once

#include <cstdint>

#include "base/kernel_tables.h"

namespace tersor::plain_attention {

struct Kernels {
  // out (head_dim) = softmax(scale * keys q) values; keys and values: (n, head_dim), n >= 1. weights: working memory, n
  // rounded up to a multiple of 16.
  void (*attend)(const float* q, const float* keys, const float* values, int64_t n, int64_t head_dim, float scale,
                 float* weights, float* out);
};

TERSOR_KERNEL_TABLES

}  // namespace tersor::plain_attention
