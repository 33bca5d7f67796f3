#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "base/isa_table.h"
#include "base/threads.h"
#include "kernels/attention/attention.h"

namespace tersor::attention {
namespace {

constexpr int64_t kChunk = 512;        // keys of one unit of work when few queries are asked
constexpr int64_t kMinMacs = 1 << 15;  // multiply-adds worth a thread

// One unit of work: some queries of some heads that share one key-value head, and a range of keys. Row r is query
// first_query + r / heads, head first_head + r % heads.
struct Unit {
  int kv_head, first_head, heads;
  int64_t first_query;
  int queries;
  int64_t begin, end;

  int rows() const { return queries * heads; }
  int64_t query(int row) const { return first_query + row / heads; }
  int64_t head(int row) const { return first_head + row % heads; }
};

// Running softmax of a unit's rows.
struct Partial {
  std::vector<float> largest, total, out;

  void reset(int rows, int width) {
    largest.assign(rows, kMasked);
    total.assign(rows, 0.0f);
    out.assign(size_t(rows) * width, 0.0f);
  }
  State state() { return {largest.data(), total.data(), out.data()}; }
};

struct Problem {
  const Kernels& kernels;
  const Cache& cache;
  int layer;
  const Rows& queries;
  int heads;
  float scale, softcap;
  int64_t window;
  float* out;

  int64_t end_of(int64_t query) const { return cache.length + query + 1; }
  int64_t first_of(int64_t query) const { return window > 0 ? std::max<int64_t>(0, end_of(query) - window) : 0; }

  void run(const Unit& u, Partial& partial) const {
    const int rows = u.rows(), head_dim = cache.head_dim;
    alignas(64) static thread_local float values[kMaxRows * kMaxWidth];
    int64_t first[kMaxRows], end[kMaxRows];
    for (int r = 0; r < rows; ++r) {
      const int64_t query = u.query(r);
      const float* q = queries.data + query * queries.stride + u.head(r) * head_dim;
      for (int d = 0; d < head_dim; ++d) values[r * head_dim + d] = q[d] * scale;
      first[r] = first_of(query);
      end[r] = end_of(query);
    }
    partial.reset(rows, cache.width);
    kernels.attend[cache.type](cache.head(layer, u.kv_head), {rows, values, first, end, softcap}, u.begin, u.end,
                               partial.state());
  }

  // Merges another part of the keys into a.
  void merge(Partial& a, const Partial& b) const {
    for (size_t r = 0; r < a.largest.size(); ++r) {
      const float top = std::max(a.largest[r], b.largest[r]);
      const float fa = std::exp(a.largest[r] - top), fb = std::exp(b.largest[r] - top);
      kernels.blend(&a.out[r * cache.width], fa, &b.out[r * cache.width], fb, cache.width);
      a.total[r] = a.total[r] * fa + b.total[r] * fb;
      a.largest[r] = top;
    }
  }

  void finish(const Unit& u, const Partial& partial) const {
    for (int r = 0; r < u.rows(); ++r) {
      float* to = out + (u.query(r) * heads + u.head(r)) * cache.head_dim;
      std::copy_n(&partial.out[r * cache.width], cache.head_dim, to);
      kernels.scale(to, cache.head_dim, 1.0f / partial.total[r]);
    }
  }
};

}  // namespace

Cache::Cache(int layers, int kv_heads, int head_dim, int64_t capacity, Float type)
    : layers(layers),
      kv_heads(kv_heads),
      head_dim(head_dim),
      width((head_dim + 15) / 16 * 16),
      capacity(capacity),
      type(type) {
  const int64_t positions = (capacity + 15) / 16 * 16;
  head_bytes_ = (positions * width * float_bytes(type) + 63) / 64 * 64;
  // calloc: untouched pages cost no memory, and read as zeros.
  data_.reset(static_cast<uint8_t*>(std::calloc(std::max<int64_t>(1, nbytes()), 1)));
  if (!data_) throw std::bad_alloc();
}

Head Cache::head(int layer, int kv_head) const {
  uint8_t* keys = data_.get() + 2 * (int64_t(layer) * kv_heads + kv_head) * head_bytes_;
  return {keys, keys + head_bytes_, head_dim, width};
}

void append(Cache& cache, int layer, const Rows& keys, const Rows& values) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  const int64_t row_values = int64_t(cache.kv_heads) * cache.head_dim;
  // Whole panels of 16 positions to a thread, since neighbours share cache lines.
  parallel_for(keys.n, std::max<int64_t>(16, (1 << 13) / row_values), [&](int64_t begin, int64_t end) {
    for (int h = 0; h < cache.kv_heads; ++h) {
      const Head head = cache.head(layer, h);
      for (int64_t i = begin; i < end; ++i) {
        kernels.append[cache.type](keys.data + i * keys.stride + int64_t(h) * cache.head_dim,
                                   values.data + i * values.stride + int64_t(h) * cache.head_dim, cache.length + i,
                                   cache.head_dim, cache.width, const_cast<void*>(head.keys),
                                   const_cast<void*>(head.values));
      }
    }
  });
}

void attend(const Cache& cache, int layer, const Rows& queries, int heads, float scale, float softcap, int64_t window,
            float* out) {
  const Problem problem{TERSOR_ACTIVE_KERNELS(), cache, layer, queries, heads, scale, softcap, window, out};
  const int share = heads / cache.kv_heads, group = std::min(share, kMaxRows);
  const int64_t n = queries.n, tile = kMaxRows / group;
  // A single tile of queries is also cut along the keys, at fixed places, so that threads have something to share.
  const int64_t first = problem.first_of(0) / 16 * 16, last = problem.end_of(n - 1);
  const int64_t chunks = n <= tile ? (last - first + kChunk - 1) / kChunk : 1;
  std::vector<Unit> units;
  for (int h = 0; h < heads; h += std::min(group, share - h % share)) {
    for (int64_t q = 0; q < n; q += tile) {
      const int count = int(std::min(tile, n - q));
      const int64_t begin = problem.first_of(q) / 16 * 16, end = problem.end_of(q + count - 1);
      for (int64_t c = 0; c < chunks; ++c) {
        units.push_back({h / share, h, std::min(group, share - h % share), q, count, begin + c * kChunk,
                         chunks > 1 ? std::min(end, begin + (c + 1) * kChunk) : end});
      }
    }
  }
  const int64_t macs = (last - first) * cache.head_dim * std::min(n, tile) * group * 2 / chunks;
  std::vector<Partial> partials(chunks > 1 ? units.size() : 0);
  parallel_for(int64_t(units.size()), std::max<int64_t>(1, kMinMacs / std::max<int64_t>(1, macs)),
               [&](int64_t begin, int64_t end) {
                 Partial own;
                 for (int64_t i = begin; i < end; ++i) {
                   Partial& partial = chunks > 1 ? partials[i] : own;
                   problem.run(units[i], partial);
                   if (chunks == 1) problem.finish(units[i], partial);
                 }
               });
  if (chunks == 1) return;
  for (size_t i = 0; i < units.size(); i += chunks) {
    for (int64_t c = 1; c < chunks; ++c) problem.merge(partials[i], partials[i + c]);
    problem.finish(units[i], partials[i]);
  }
}

}  // namespace tersor::attention
