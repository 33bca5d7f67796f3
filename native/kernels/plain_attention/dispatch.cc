#include <algorithm>
#include <vector>

#include "base/isa_table.h"
#include "base/threads.h"
#include "kernels/plain_attention/plain_attention.h"

namespace tersor::plain_attention {
namespace {

constexpr int64_t kMinMacs = 1 << 15;  // multiply-adds worth a thread: a few microseconds, for they wait for memory

int64_t place(const Memory& m, int64_t sequence, int64_t kv_head, int64_t position) {
  return ((sequence * m.kv_heads + kv_head) * m.capacity + position) * m.head_dim;
}

}  // namespace

void append(const Memory& memory, const float* keys, int64_t key_stride, const float* values, int64_t value_stride) {
  const int64_t d = memory.head_dim;
  for (int64_t s = 0; s < memory.sequences; ++s) {
    for (int64_t h = 0; h < memory.kv_heads; ++h) {
      const int64_t at = place(memory, s, h, memory.length);
      std::copy_n(keys + s * key_stride + h * d, d, memory.keys + at);
      std::copy_n(values + s * value_stride + h * d, d, memory.values + at);
    }
  }
}

void attend(const Memory& memory, const float* queries, int64_t stride, int64_t heads, float scale, float* out) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  const int64_t d = memory.head_dim, n = memory.length + 1, share = heads / memory.kv_heads;
  const int64_t grain = std::max<int64_t>(1, kMinMacs / (2 * n * d));
  parallel_for(memory.sequences * heads, grain, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> weights;
    weights.resize(std::max<size_t>(weights.size(), size_t(n + 15) / 16 * 16));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / heads, head = i % heads, at = place(memory, sequence, head / share, 0);
      kernels.attend(queries + sequence * stride + head * d, memory.keys + at, memory.values + at, n, d, scale,
                     weights.data(), out + i * d);
    }
  });
}

}  // namespace tersor::plain_attention
