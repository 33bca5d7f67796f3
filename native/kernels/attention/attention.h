// The key-value cache and attention over it.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>

#include "kernels/attention/kernels.h"

namespace tersor::attention {

// Keys and values of every layer for positions [0, length); layout in kernels.h. Memory is reserved for `capacity`
// positions and touched as positions are appended, in segments: the first kSegment positions of all layers and heads,
// then always as many as came before. So large pages, which spare address translations, cost at most about as much
// again as what is held, and a head's positions still lie in a few long runs.
class Cache {
 public:
  // Throws std::bad_alloc.
  Cache(int layers, int kv_heads, int head_dim, int64_t capacity, Type type);

  // A fork: like origin's first n positions, n a multiple of kKeys, which are not copied but read there. The origin
  // outlives it and keeps them as they are.
  Cache(const Cache& origin, int64_t n);

  const int layers, kv_heads, head_dim, width;
  const int64_t capacity;
  const Type type;
  int64_t length = 0;
  int64_t fixed = 0;  // positions that stay as they are: those of the origin, and those that forks read here

  int64_t nbytes() const {
    const int64_t first = segment_begin(capacity - 1);
    return bytes_before(first) + bytes_of(capacity - first);
  }
  // Where this position is, and is to be written, and all up to the end given back, a multiple of kKeys.
  Head piece(int layer, int kv_head, int64_t position, int64_t& end) const;

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  static constexpr int64_t kSegment = 256;  // a power of two

  static int64_t segment_begin(int64_t position) {
    return position < kSegment ? 0 : int64_t(std::bit_floor(uint64_t(position)));
  }

  // Of one layer and head in a segment of so many positions.
  struct Sizes {
    int64_t codes;  // of the keys, and as many of the values
    int64_t key_scales, value_scales, anchors;
    int64_t all() const { return 2 * codes + key_scales + value_scales + anchors; }
  };
  Sizes sizes(int64_t positions) const;
  int64_t bytes_of(int64_t positions) const { return int64_t(layers) * kv_heads * sizes(positions).all(); }
  // Of the segments before the one that begins at `first`.
  int64_t bytes_before(int64_t first) const { return first / kSegment * bytes_of(kSegment); }

  const Cache* origin_ = nullptr;  // of positions below shared_
  int64_t shared_ = 0;
  std::unique_ptr<uint8_t, Free> memory_;
  uint8_t* data_;  // in it, at a multiple of 64, or of a large page
};

// Rows of heads: row i is at data + i * stride; each is (heads, head_dim), contiguous.
struct Rows {
  const float* data;
  int64_t n, stride;
};

// Rows [row, row + n) belong to one sequence, at positions cache->length and on.
struct Span {
  Cache* cache;
  int64_t row, n;
};

// Writes keys and values at positions length .. length + n of a layer of each span's cache, which are different ones.
void append(std::span<const Span> spans, int layer, const Rows& keys, const Rows& values);

// out (n, heads * head_dim) = softmax(scale * q k^T) v. Query i of a span is at position length + i and sees the keys
// up to its own, only the last `window` if window > 0; softcap > 0: scores become softcap * tanh(score / softcap).
// The caches have equally many kv heads and equal head dimensions. A row has the same bits whatever the other rows and
// the threads are, but where Kernels::attend_many has others than attend.
void attend(std::span<const Span> spans, int layer, const Rows& queries, int heads, float scale, float softcap,
            int64_t window, float* out);

}  // namespace tersor::attention
