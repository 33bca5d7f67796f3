// The key-value cache and attention.
#include "kernels/attention/attention.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <vector>

#include "bindings/op_arrays.h"

namespace nb = nanobind;
using namespace tersor;
using namespace tersor::ops_bindings;
using attention::Cache;

namespace {

// (n, heads, head_dim); the rows may be apart, so that q, k and v can be views of one product.
using Heads = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;

using Caches = std::vector<Cache*>;

attention::Rows rows_of(const char* what, const Heads& x, int64_t heads, int64_t head_dim) {
  require_size(what, "heads", int64_t(x.shape(1)), heads);
  require_size(what, "head_dim", int64_t(x.shape(2)), head_dim);
  require(x.stride(2) == 1 && x.stride(1) == head_dim, what, ": heads of a row are not contiguous");
  return {x.data(), int64_t(x.shape(0)), x.stride(0)};
}

void check_layer(const Cache& cache, int layer) {
  require(layer >= 0 && layer < cache.layers, "layer ", layer, ", need 0 to ", cache.layers - 1);
}

void check_room(const char* what, const Cache& cache, int64_t n) {
  require(cache.length + n <= cache.capacity, what, ": position ", cache.length + n, ", the cache holds ",
          cache.capacity);
}

// Row i belongs to caches[i]: the spans of that, after checking that there are n caches of one shape with room for it.
std::vector<attention::Span> spans_of(const char* what, const Caches& caches, int layer, int64_t n) {
  require(!caches.empty(), what, ": no caches");
  require_size(what, "rows", n, int64_t(caches.size()));
  std::vector<attention::Span> spans;
  for (Cache* cache : caches) {
    check_layer(*cache, layer);
    require(cache->kv_heads == caches[0]->kv_heads && cache->head_dim == caches[0]->head_dim, what,
            ": caches of different models");
    check_room(what, *cache, 1);
    spans.push_back({cache, int64_t(spans.size()), 1});
  }
  return spans;
}

void make_cache(Cache* self, int layers, int kv_heads, int head_dim, int64_t capacity, const std::string& dtype) {
  require(layers > 0 && kv_heads > 0 && head_dim > 0 && capacity > 0,
          "KVCache: layers, kv_heads, head_dim and capacity must be positive");
  require(head_dim <= attention::kMaxWidth, "KVCache: head_dim ", head_dim, ", need at most ", attention::kMaxWidth);
  require(dtype == "f16" || dtype == "f32" || dtype == "int8" || dtype == "int4", "KVCache: dtype '", dtype,
          "', need f16, f32, int8 or int4");
  const attention::Type type = dtype == "f16"    ? attention::kFloat16
                               : dtype == "f32"  ? attention::kFloat32
                               : dtype == "int8" ? attention::kInt8
                                                 : attention::kInt4;
  new (self) Cache(layers, kv_heads, head_dim, capacity, type);
}

void append_rows(Cache& cache, int layer, const Heads& k, const Heads& v) {
  check_layer(cache, layer);
  const attention::Rows keys = rows_of("append: k", k, cache.kv_heads, cache.head_dim);
  const attention::Rows values = rows_of("append: v", v, cache.kv_heads, cache.head_dim);
  require_size("append", "rows of v", values.n, keys.n);
  check_room("append", cache, keys.n);
  nb::gil_scoped_release release;
  const attention::Span span{&cache, 0, keys.n};
  attention::append({&span, 1}, layer, keys, values);
}

void append_batch(const Heads& k, const Heads& v, const Caches& caches, int layer) {
  const std::vector<attention::Span> spans = spans_of("append_batch", caches, layer, int64_t(k.shape(0)));
  Caches sorted = caches;
  std::sort(sorted.begin(), sorted.end());
  require(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), "append_batch: a cache is given twice");
  const attention::Rows keys = rows_of("append_batch: k", k, caches[0]->kv_heads, caches[0]->head_dim);
  const attention::Rows values = rows_of("append_batch: v", v, caches[0]->kv_heads, caches[0]->head_dim);
  require_size("append_batch", "rows of v", values.n, keys.n);
  nb::gil_scoped_release release;
  attention::append(spans, layer, keys, values);
}

void advance_cache(Cache& cache, int64_t n) {
  require(n >= 0 && cache.length + n <= cache.capacity, "advance: position ", cache.length + n, ", the cache holds ",
          cache.capacity);
  cache.length += n;
}

void truncate_cache(Cache& cache, int64_t n) {
  require(n >= cache.fixed && n <= cache.length, "truncate: ", n, ", need ", cache.fixed, " to ", cache.length);
  cache.length = n;
}

Cache* fork_cache(Cache& cache, int64_t n) {
  require(n >= 0 && n <= cache.length && n % attention::kKeys == 0, "fork: ", n, ", need a multiple of ",
          int64_t(attention::kKeys), " up to ", cache.length);
  cache.fixed = std::max(cache.fixed, n);
  return new Cache(cache, n);
}

// Queries of caches of one shape, after checks.
attention::Rows queries_of(const char* what, const Heads& q, const Cache& cache, const Array<float, 2>& out) {
  const auto heads = int64_t(q.shape(1));
  require(heads > 0 && heads % cache.kv_heads == 0, what, ": ", heads, " heads, need a multiple of ", cache.kv_heads);
  const attention::Rows queries = rows_of(what, q, heads, cache.head_dim);
  require_size(what, "rows of out", int64_t(out.shape(0)), queries.n);
  require_size(what, "columns of out", int64_t(out.shape(1)), heads * cache.head_dim);
  return queries;
}

void attend(const Heads& q, Cache& cache, int layer, float scale, float softcap, int64_t window, Array<float, 2> out) {
  check_layer(cache, layer);
  const attention::Rows queries = queries_of("attention", q, cache, out);
  check_room("attention", cache, queries.n);
  if (queries.n == 0) return;
  nb::gil_scoped_release release;
  const attention::Span span{&cache, 0, queries.n};
  attention::attend({&span, 1}, layer, queries, int(q.shape(1)), scale, softcap, window, out.data());
}

void attend_batch(const Heads& q, const Caches& caches, int layer, float scale, float softcap, int64_t window,
                  Array<float, 2> out) {
  const std::vector<attention::Span> spans = spans_of("attention_batch", caches, layer, int64_t(q.shape(0)));
  const attention::Rows queries = queries_of("attention_batch", q, *caches[0], out);
  nb::gil_scoped_release release;
  attention::attend(spans, layer, queries, int(q.shape(1)), scale, softcap, window, out.data());
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<Cache>(
      m, "KVCache",
      "Keys and values of every layer for positions [0, length). append writes at length; advance moves it.\n\n"
      "capacity: positions; dtype: f16 | f32 | int8 | int4, the type that keys and values are rounded to. int8 has a "
      "float scale for every 32 values of a key and 64 of a value, int4 a float16 scale and minimum for every 32. "
      "Memory is touched as it is filled.")
      .def("__init__", &make_cache, nb::arg("layers"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("capacity"),
           nb::arg("dtype") = "f16")
      .def_ro("length", &Cache::length, "Positions held.")
      .def_ro("capacity", &Cache::capacity, "Positions that fit.")
      .def_prop_ro("nbytes", &Cache::nbytes, "Bytes at full capacity.")
      .def("append", &append_rows, nb::arg("layer"), nb::arg("k"), nb::arg("v"),
           "Writes k and v, (n, kv_heads, head_dim) float32, at positions length .. length + n. Rows may be apart "
           "(views are fine).")
      .def("advance", &advance_cache, nb::arg("n"),
           "Moves length forward by the n positions that every layer has appended.")
      .def("truncate", &truncate_cache, nb::arg("n"),
           "Forgets everything from position n on; not what a fork shares with its origin.")
      .def("fork", &fork_cache, nb::arg("n"), nb::keep_alive<0, 1>(), nb::rv_policy::take_ownership,
           "A cache of the same capacity that begins with this one's first n positions, n a multiple of 64. They stay "
           "here and are read here: nothing is copied, and neither cache can forget them again.");
  m.def("attention", &attend, nb::arg("q"), nb::arg("cache"), nb::arg("layer"), nb::arg("scale"), nb::arg("softcap"),
        nb::arg("window"), nb::arg("out"), "out = softmax(scale q k^T) v; see tersor.ops.attention");
  m.def("append_batch", &append_batch, nb::arg("k"), nb::arg("v"), nb::arg("caches"), nb::arg("layer"),
        "Writes row i of k and v at the length of caches[i]; see tersor.ops.append_batch");
  m.def("attention_batch", &attend_batch, nb::arg("q"), nb::arg("caches"), nb::arg("layer"), nb::arg("scale"),
        nb::arg("softcap"), nb::arg("window"), nb::arg("out"),
        "Row i of q attends to caches[i]; see tersor.ops.attention_batch");
}
