// The key-value cache and attention.
#include "kernels/attention/attention.h"

#include <nanobind/stl/string.h>

#include "bindings/op_arrays.h"

namespace nb = nanobind;
using namespace tersor;
using namespace tersor::ops_bindings;
using attention::Cache;

namespace {

// (n, heads, head_dim); the rows may be apart, so that q, k and v can be views of one product.
using Heads = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;

attention::Rows rows_of(const char* what, const Heads& x, int64_t heads, int64_t head_dim) {
  require_size(what, "heads", int64_t(x.shape(1)), heads);
  require_size(what, "head_dim", int64_t(x.shape(2)), head_dim);
  require(x.stride(2) == 1 && x.stride(1) == head_dim, what, ": heads of a row are not contiguous");
  return {x.data(), int64_t(x.shape(0)), x.stride(0)};
}

void check_layer(const Cache& cache, int layer) {
  require(layer >= 0 && layer < cache.layers, "layer ", layer, ", need 0 to ", cache.layers - 1);
}

void make_cache(Cache* self, int layers, int kv_heads, int head_dim, int64_t capacity, const std::string& dtype) {
  require(layers > 0 && kv_heads > 0 && head_dim > 0 && capacity > 0,
          "KVCache: layers, kv_heads, head_dim and capacity must be positive");
  require(head_dim <= attention::kMaxWidth, "KVCache: head_dim ", head_dim, ", need at most ", attention::kMaxWidth);
  require(dtype == "f16" || dtype == "f32", "KVCache: dtype '", dtype, "', need f16 or f32");
  new (self) Cache(layers, kv_heads, head_dim, capacity, dtype == "f16" ? kF16 : kF32);
}

void append_rows(Cache& cache, int layer, const Heads& k, const Heads& v) {
  check_layer(cache, layer);
  const attention::Rows keys = rows_of("append: k", k, cache.kv_heads, cache.head_dim);
  const attention::Rows values = rows_of("append: v", v, cache.kv_heads, cache.head_dim);
  require_size("append", "rows of v", values.n, keys.n);
  require(cache.length + keys.n <= cache.capacity, "append: position ", cache.length + keys.n, ", the cache holds ",
          cache.capacity);
  nb::gil_scoped_release release;
  attention::append(cache, layer, keys, values);
}

void advance_cache(Cache& cache, int64_t n) {
  require(n >= 0 && cache.length + n <= cache.capacity, "advance: position ", cache.length + n, ", the cache holds ",
          cache.capacity);
  cache.length += n;
}

void truncate_cache(Cache& cache, int64_t n) {
  require(n >= 0 && n <= cache.length, "truncate: ", n, ", need 0 to ", cache.length);
  cache.length = n;
}

void attend(const Heads& q, const Cache& cache, int layer, float scale, float softcap, int64_t window,
            Array<float, 2> out) {
  check_layer(cache, layer);
  const auto n = int64_t(q.shape(0)), heads = int64_t(q.shape(1));
  require(heads > 0 && heads % cache.kv_heads == 0, "attention: ", heads, " heads, need a multiple of ",
          cache.kv_heads);
  const attention::Rows queries = rows_of("attention: q", q, heads, cache.head_dim);
  require(cache.length + n <= cache.capacity, "attention: position ", cache.length + n, ", the cache holds ",
          cache.capacity);
  require_size("attention", "rows of out", int64_t(out.shape(0)), n);
  require_size("attention", "columns of out", int64_t(out.shape(1)), heads * cache.head_dim);
  if (n == 0) return;
  nb::gil_scoped_release release;
  attention::attend(cache, layer, queries, int(heads), scale, softcap, window, out.data());
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<Cache>(
      m, "KVCache",
      "Keys and values of every layer for positions [0, length). append writes at length; advance moves it.\n\n"
      "capacity: positions; dtype: f16 | f32, the type that keys and values are rounded to. Memory is touched as it is "
      "filled.")
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
      .def("truncate", &truncate_cache, nb::arg("n"), "Forgets everything from position n on.");
  m.def("attention", &attend, nb::arg("q"), nb::arg("cache"), nb::arg("layer"), nb::arg("scale"), nb::arg("softcap"),
        nb::arg("window"), nb::arg("out"), "out = softmax(scale q k^T) v; see tersor.ops.attention");
}
