// Attention of single tokens to keys and values that lie as other libraries hold them: float32, a row of head_dim
// values for every sequence, key-value head and position. The engine's own cache (kernels/attention) is faster over
// many keys; this one is read and written by others between two tokens.
#pragma once

#include <cstdint>

#include "kernels/plain_attention/kernels.h"

namespace tersor::plain_attention {

// Keys and values, (sequences, kv_heads, capacity, head_dim) each, of which positions [0, length) are filled.
struct Memory {
  float* keys;
  float* values;
  int64_t sequences, kv_heads, capacity, head_dim, length;
};

// Writes the keys and values of a token of each sequence at position length. Rows are `stride` values apart, of
// (kv_heads, head_dim).
void append(const Memory& memory, const float* keys, int64_t key_stride, const float* values, int64_t value_stride);

// out (sequences, heads * head_dim) = softmax(scale q k^T) v over positions [0, length]. Query rows are `stride` values
// apart, of (heads, head_dim); heads share keys in groups of heads / kv_heads. The same bits for any number of threads.
void attend(const Memory& memory, const float* queries, int64_t stride, int64_t heads, float scale, float* out);

}  // namespace tersor::plain_attention
