#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "base/isa_table.h"
#include "base/memory.h"
#include "base/threads.h"
#include "kernels/attention/attention.h"

namespace tersor::attention {
namespace {

// Keys of one softmax. Chunks begin at multiples of it whatever is asked, each is softened by itself, and they are
// merged in order, so that a row's bits depend neither on the threads nor on the rows beside it.
constexpr int64_t kChunk = 256;
constexpr int64_t kMinMacs = 1 << 17;  // multiply-adds worth waking a thread: a few microseconds
constexpr int kTilesPerThread = 4;     // enough that the last do not leave threads idle
constexpr int kUnitsPerThread = 8;     // the same of parts of tiles
constexpr int kFewRows = 16;           // rows of a tile whose queries one thread loads for all
constexpr int64_t kHugePage = 2 << 20;
constexpr float kLog2e = 1.44269504088896341f;

// Floats at a multiple of 64 bytes, kept from call to call.
class Buffer {
 public:
  float* at_least(int64_t n) {
    if (n > int64_t(floats_.size())) floats_.resize(n);
    return floats_.data();
  }

 private:
  LargeVector<float> floats_;
};

// Some queries of one sequence and of heads that share a key-value head. Row r is query first_query + r / heads, head
// first_head + r % heads. Keys [begin, end) are seen by any.
struct Tile {
  const Cache* cache;
  int kv_head, first_head, heads;
  int64_t first_row, first_query;  // in the queries and in the sequence
  int queries;
  int64_t begin, end;
  bool many;  // it is of a span of kManyQueries or more

  int rows() const { return queries * heads; }
  int64_t first_chunk() const { return begin / kChunk; }
  int64_t chunks() const { return (end + kChunk - 1) / kChunk - first_chunk(); }
  int64_t macs() const { return (end - begin) * rows() * cache->head_dim * 2; }
};

// A tile's chunks [first, first + count), counted from its first; what one thread does at a time.
struct Unit {
  int tile;
  int64_t first, count, macs;
};

struct Problem {
  const Kernels& kernels;
  int layer;
  const Rows& queries;
  int heads;
  float scale, softcap;
  int64_t window;
  float* out;

  int64_t end_of(const Cache& cache, int64_t query) const { return cache.length + query + 1; }
  int64_t first_of(const Cache& cache, int64_t query) const {
    return window > 0 ? std::max<int64_t>(0, end_of(cache, query) - window) : 0;
  }

  // Floats of the state of a tile's rows.
  static int64_t state_size(const Tile& t) {
    const int padded = (t.rows() + 15) / 16 * 16;  // attend_many
    return int64_t(padded) * (t.cache->width + 16) + kMaxRows;
  }
  static State state_at(const Tile& t, float* at) {
    float* totals = at + kMaxRows;
    return {at, totals, totals + int64_t(t.rows()) * 16};
  }

  // Cuts a span into tiles.
  void cut(const Span& span, std::vector<Tile>& tiles) const {
    const Cache& cache = *span.cache;
    const int share = heads / cache.kv_heads, group = std::min(share, kMaxRows);
    const int64_t height = kMaxRows / group;
    for (int64_t q = 0; q < span.n; q += height) {
      const int count = int(std::min(height, span.n - q));
      const int64_t begin = first_of(cache, q) / kKeys * kKeys, end = end_of(cache, q + count - 1);
      for (int h = 0; h < heads;) {
        const int together = std::min(group, share - h % share);
        tiles.push_back({&cache, h / share, h, together, span.row + q, q, count, begin, end, span.n >= kManyQueries});
        h += together;
      }
    }
  }

  // One chunk's softmax of a tile's rows, whose queries are loaded; the thread goes on with the chunks up to `last`.
  void run_chunk(const Tile& t, int64_t chunk, int64_t last, const float* q, const State& state, float* scratch) const {
    int64_t first[kMaxRows], end[kMaxRows];
    for (int r = 0; r < t.rows(); ++r) {
      const int64_t query = t.first_query + r / t.heads;
      first[r] = first_of(*t.cache, query);
      end[r] = end_of(*t.cache, query);
    }
    std::fill_n(state.largest, t.rows(), kLowest);
    std::fill_n(state.total, int64_t(t.rows()) * 16, 0.0f);
    std::fill_n(state.out, int64_t(t.rows()) * t.cache->width, 0.0f);
    const int64_t start = (t.first_chunk() + chunk) * kChunk, stop = std::min(t.end, start + kChunk);
    const int64_t wanted = std::min(t.end, (t.first_chunk() + last) * kChunk);
    const Queries rows{t.rows(), q, first, end, softcap * kLog2e};
    for (int64_t at = std::max(t.begin, start), piece_end; at < stop; at = piece_end) {
      Head head = t.cache->piece(layer, t.kv_head, at, piece_end);
      head.wanted = std::min(wanted, piece_end);
      (t.many ? kernels.attend_many : kernels.attend)[t.cache->type](head, rows, at, std::min(stop, piece_end), state,
                                                                     scratch);
    }
  }

  // Merges the softmax of the keys after a's into a.
  void merge(const Tile& t, const State& a, const State& b) const {
    const int64_t width = t.cache->width;
    for (int r = 0; r < t.rows(); ++r) {
      const float top = std::max(a.largest[r], b.largest[r]);
      const float fa = std::exp2(a.largest[r] - top), fb = std::exp2(b.largest[r] - top);
      kernels.blend(a.out + r * width, fa, b.out + r * width, fb, int(width));
      kernels.blend(a.total + r * 16, fa, b.total + r * 16, fb, 16);
      a.largest[r] = top;
    }
  }

  void finish(const Tile& t, const State& state) const {
    for (int r = 0; r < t.rows(); ++r) {
      kernels.finish(state.out + int64_t(r) * t.cache->width, state.total + r * 16, t.cache->head_dim,
                     out + ((t.first_row + r / t.heads) * heads + t.first_head + r % t.heads) * t.cache->head_dim);
    }
  }

  static int64_t queries_size(const Tile& t) { return int64_t(t.rows()) * query_floats(t.cache->type, t.cache->width); }
  void load_queries(const Tile& t, float* to) const {
    const Cache& cache = *t.cache;
    for (int r = 0; r < t.rows(); ++r, to += query_floats(cache.type, cache.width)) {
      kernels.load_query[cache.type](
          queries.data + (t.first_row + r / t.heads) * queries.stride + (t.first_head + r % t.heads) * cache.head_dim,
          scale * kLog2e, cache.head_dim, cache.width, to);
    }
  }
};

// What a call needs besides its arguments, kept by the calling thread. A tile that is cut into units has its queries
// loaded if they are few, a state for every chunk, and counts the units left; whoever does the last one merges them.
struct Plan {
  std::vector<Tile> tiles;
  std::vector<Unit> units;
  std::vector<int64_t> state_offset;  // of a tile, in states; -1: one unit does it all
  std::vector<int64_t> query_offset;  // of a tile, in loaded; -1: every unit loads them
  Buffer states, loaded;
  std::vector<std::atomic<int64_t>> left;

  // Cuts the work; returns its multiply-adds.
  int64_t cut(const Problem& problem, std::span<const Span> spans) {
    tiles.clear();
    units.clear();
    for (const Span& span : spans) problem.cut(span, tiles);
    const bool whole = int64_t(tiles.size()) >= int64_t(kTilesPerThread) * threads();
    state_offset.assign(tiles.size(), -1);
    query_offset.assign(tiles.size(), -1);
    if (left.size() < tiles.size()) left = std::vector<std::atomic<int64_t>>(2 * tiles.size());
    int64_t floats = 0, query_floats = 0, macs = 0, all_chunks = 0;
    for (const Tile& t : tiles) all_chunks += t.chunks();
    const int64_t most = std::max<int64_t>(1, all_chunks / (kUnitsPerThread * threads()));
    for (size_t i = 0; i < tiles.size(); ++i) {
      const Tile& t = tiles[i];
      const int64_t chunks = t.chunks(), count = whole ? chunks : std::min(chunks, most);
      for (int64_t c = 0; c < chunks; c += count) {
        const int64_t some = std::min(count, chunks - c);
        units.push_back({int(i), c, some, t.macs() / chunks * some});
      }
      if (count < chunks) {
        state_offset[i] = floats;
        floats += Problem::state_size(t) * chunks;
        left[i].store(chunks, std::memory_order_relaxed);
        if (t.rows() <= kFewRows) {
          query_offset[i] = query_floats;
          query_floats += Problem::queries_size(t);
        }
      }
      macs += t.macs();
    }
    states.at_least(floats);
    float* queries = loaded.at_least(query_floats);
    for (size_t i = 0; i < tiles.size(); ++i) {
      if (query_offset[i] >= 0) problem.load_queries(tiles[i], queries + query_offset[i]);
    }
    // The longest first, so that threads end together.
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.macs > b.macs; });
    return macs;
  }
};

void run_unit(const Problem& problem, Plan& plan, const Unit& unit) {
  static thread_local Buffer queries, scratch, own;
  const Tile& t = plan.tiles[unit.tile];
  const int64_t size = Problem::state_size(t);
  float* work = scratch.at_least(scratch_floats(t.cache->head_dim, t.cache->width));
  const float* q = nullptr;
  if (plan.query_offset[unit.tile] >= 0) {
    q = plan.loaded.at_least(0) + plan.query_offset[unit.tile];
  } else {
    float* to = queries.at_least(Problem::queries_size(t));
    problem.load_queries(t, to);
    q = to;
  }
  if (plan.state_offset[unit.tile] < 0) {
    float* states = own.at_least(2 * size);
    const State sum = Problem::state_at(t, states), next = Problem::state_at(t, states + size);
    problem.run_chunk(t, 0, unit.count, q, sum, work);
    for (int64_t c = 1; c < unit.count; ++c) {
      problem.run_chunk(t, c, unit.count, q, next, work);
      problem.merge(t, sum, next);
    }
    problem.finish(t, sum);
    return;
  }
  float* states = plan.states.at_least(0) + plan.state_offset[unit.tile];
  const int64_t last = unit.first + unit.count;
  for (int64_t c = unit.first; c < last; ++c) {
    problem.run_chunk(t, c, last, q, Problem::state_at(t, states + c * size), work);
  }
  if (plan.left[unit.tile].fetch_sub(unit.count, std::memory_order_acq_rel) > unit.count) return;
  const State sum = Problem::state_at(t, states);
  for (int64_t c = 1; c < t.chunks(); ++c) problem.merge(t, sum, Problem::state_at(t, states + c * size));
  problem.finish(t, sum);
}

}  // namespace

Cache::Cache(int layers, int kv_heads, int head_dim, int64_t capacity, Type type)
    : layers(layers),
      kv_heads(kv_heads),
      head_dim(head_dim),
      width((head_dim + 15) / 16 * 16),
      capacity(capacity),
      type(type) {
  const int64_t alignment = nbytes() >= kHugePage ? kHugePage : 64;
  // calloc: untouched pages cost no memory, and read as zeros.
  memory_.reset(static_cast<uint8_t*>(std::calloc(nbytes() + alignment, 1)));
  if (!memory_) throw std::bad_alloc();
  data_ = memory_.get() + (alignment - reinterpret_cast<uintptr_t>(memory_.get()) % alignment) % alignment;
#ifdef __linux__
  if (alignment == kHugePage) madvise(data_, nbytes() / kHugePage * kHugePage, MADV_HUGEPAGE);  // only a hint
#endif
}

Cache::Cache(const Cache& origin, int64_t n)
    : Cache(origin.layers, origin.kv_heads, origin.head_dim, origin.capacity, origin.type) {
  length = fixed = shared_ = n;
  origin_ = &origin;
}

Cache::Sizes Cache::sizes(int64_t positions) const {
  positions = (positions + 15) / 16 * 16;
  const int64_t scales = is_integer(type) ? positions * 4 : 0;  // bytes for a group of each
  const int64_t anchors = type == kInt4 ? (positions + kKeys - 1) / kKeys * width * 2 : 0;
  return {(positions * width * type_bits(type) / 8 + 63) / 64 * 64, scales * key_groups(width),
          scales * value_groups(type, width), (anchors + 63) / 64 * 64};
}

Head Cache::piece(int layer, int kv_head, int64_t position, int64_t& end) const {
  if (position < shared_) {
    const Head found = origin_->piece(layer, kv_head, position, end);
    end = std::min(end, shared_);
    return found;
  }
  const int64_t first = segment_begin(position);
  end = std::max(2 * first, kSegment);
  const Sizes size = sizes(std::min(end, capacity) - first);
  uint8_t* keys = data_ + bytes_before(first) + (int64_t(layer) * kv_heads + kv_head) * size.all();
  uint8_t* scales = keys + 2 * size.codes;
  return {keys,
          keys + size.codes,
          reinterpret_cast<float*>(scales),
          reinterpret_cast<float*>(scales + size.key_scales),
          reinterpret_cast<uint16_t*>(scales + size.key_scales + size.value_scales),
          head_dim,
          width,
          first,
          end};
}

void append(std::span<const Span> spans, int layer, const Rows& keys, const Rows& values) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  for (const Span& span : spans) {
    const Cache& cache = *span.cache;
    const int64_t row_values = int64_t(cache.kv_heads) * cache.head_dim;
    // Whole panels of 16 positions to a thread, since neighbours share cache lines, or even bytes; or all positions
    // that have one anchor, which the first of them writes.
    const int64_t unit = cache.type == kInt4 ? kKeys : 16, first = cache.length / unit,
                  units = (cache.length + span.n + unit - 1) / unit - first;
    const int64_t grain = std::max<int64_t>(1, (1 << 13) / (row_values * unit));
    parallel_for(units, grain, [&](int64_t first_unit, int64_t end_unit) {
      const int64_t begin = std::max<int64_t>(0, (first + first_unit) * unit - cache.length),
                    end = std::min(span.n, (first + end_unit) * unit - cache.length);
      for (int h = 0; h < cache.kv_heads; ++h) {
        const int64_t at = span.row * keys.stride + int64_t(h) * cache.head_dim,
                      value_at = span.row * values.stride + int64_t(h) * cache.head_dim;
        for (int64_t i = begin, piece_end; i < end; i = piece_end) {
          const Head head = cache.piece(layer, h, cache.length + i, piece_end);
          piece_end = std::min(end, piece_end - cache.length);
          for (; i < piece_end; ++i) {
            kernels.append[cache.type](keys.data + at + i * keys.stride, values.data + value_at + i * values.stride,
                                       cache.length + i - head.first, head);
          }
        }
      }
    });
  }
}

void attend(std::span<const Span> spans, int layer, const Rows& queries, int heads, float scale, float softcap,
            int64_t window, float* out) {
  static thread_local Plan plan;
  const Problem problem{
      TERSOR_OR_TILE_KERNELS(TERSOR_ACTIVE_KERNELS()), layer, queries, heads, scale, softcap, window, out};
  const int64_t macs = plan.cut(problem, spans);
  const auto n = int64_t(plan.units.size());
  const int64_t useful = std::min<int64_t>({n, threads(), std::max<int64_t>(1, macs / kMinMacs)});
  Plan& shared = plan;  // a lambda would name the thread_local of the thread that runs it
  std::atomic<int64_t> next{0};
  parallel_for(useful, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < n;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      run_unit(problem, shared, shared.units[i]);
    }
  });
}

}  // namespace tersor::attention
