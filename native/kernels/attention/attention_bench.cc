// Speed of attention beside this machine's limits, for every instruction set and cache type.
//   cmake --build build/dev --target attention_bench && build/dev/attention_bench [threads] [isa]
// Times are CPU time per thread, the least of several rounds, so that other work on the machine disturbs little.
// Floors: multiply-adds at flops_per_core, cache bytes at the bandwidth measured in the same run; the larger of both.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/bandwidth.h"
#include "base/cpu.h"
#include "base/cpu_seconds.h"
#include "base/threads.h"
#include "kernels/attention/attention.h"

using namespace tersor;
using namespace tersor::attention;

namespace {

struct Shape {
  const char* name;
  int layers, heads, kv_heads, head_dim;
};

constexpr Shape kShapes[] = {{"smollm2", 30, 9, 3, 64}, {"32 heads", 22, 32, 4, 64}, {"qwen 1.5b", 28, 12, 2, 128}};
// A 512-bit fused multiply-add each cycle at 3.44 GHz: a core of Zen 4. Of 16-bit integers twice as many.
constexpr double flops_per_core(Type type) { return is_integer(type) ? 220e9 : 110e9; }

std::vector<float> values(int64_t n) {
  std::vector<float> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = float(int(uint32_t(i * 2654435761u) >> 20) % 2000 - 1000) / 1000;
  return x;
}

void fill(Cache& cache, int64_t n) {
  const std::vector<float> x = values(n * cache.kv_heads * cache.head_dim);
  const Rows rows{x.data(), n, int64_t(cache.kv_heads) * cache.head_dim};
  const Span span{&cache, 0, n};
  for (int layer = 0; layer < cache.layers; ++layer) append({&span, 1}, layer, rows, rows);
}

void time_prefill(const Shape& s, Type type, int64_t n) {
  Cache cache(s.layers, s.kv_heads, s.head_dim, n, type);
  fill(cache, n);
  const std::vector<float> q = values(n * s.heads * s.head_dim);
  std::vector<float> out(q.size());
  const Rows rows{q.data(), n, int64_t(s.heads) * s.head_dim};
  const Span span{&cache, 0, rows.n};
  const double t = cpu_seconds([&] {
    for (int layer = 0; layer < s.layers; ++layer) attend({&span, 1}, layer, rows, s.heads, 0.125f, 0, 0, out.data());
  });
  const double flops = 4.0 * s.layers * s.heads * s.head_dim * double(n * (n + 1) / 2), peak = flops_per_core(type);
  std::printf("  prefill %4lld: %6.3f core-ms/token (floor %5.3f)  %5.1f GFLOP/s a core, %4.1f %% of the peak\n",
              (long long)n, t * threads() / double(n) * 1e3, flops / peak / double(n) * 1e3,
              flops / threads() / t * 1e-9, 100 * flops / threads() / t / peak);
}

void time_decode(const Shape& s, Type type, int64_t context, double bandwidth) {
  Cache cache(s.layers, s.kv_heads, s.head_dim, context + 1, type);
  fill(cache, context + 1);
  cache.length = context;
  const std::vector<float> q = values(s.heads * s.head_dim);
  std::vector<float> out(q.size());
  const Rows rows{q.data(), 1, int64_t(s.heads) * s.head_dim};
  const Span span{&cache, 0, rows.n};
  const double t = cpu_seconds([&] {
    for (int layer = 0; layer < s.layers; ++layer) attend({&span, 1}, layer, rows, s.heads, 0.125f, 0, 0, out.data());
  });
  const double bytes = double(cache.nbytes()), flops = 4.0 * s.layers * s.heads * s.head_dim * double(context + 1);
  const double floor = std::max(bytes / bandwidth, flops / threads() / flops_per_core(type));
  std::printf("  decode at %4lld: %6.3f ms/token (floor %5.3f)  %5.1f GB/s of the cache\n", (long long)context, t * 1e3,
              floor * 1e3, bytes / t * 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
  set_threads(argc > 1 ? std::atoi(argv[1]) : 1);
  const std::vector<uint64_t> words(256 << 17, 1);
  uint64_t sink = 0;
  const double read = cpu_seconds([&] { sink += read_words(words.data(), int64_t(words.size())); });
  const double bandwidth = double(sink ? 256 << 20 : 0) / read;
  std::printf("%d threads; memory reads %.1f GB/s\n", threads(), bandwidth * 1e-9);
  for (Isa isa : supported_isas()) {
    if (argc > 2 ? std::strcmp(argv[2], isa_name(isa)) != 0 : isa == Isa::kScalar) continue;
    force_isa(isa_name(isa));
    for (const Shape& s : kShapes) {
      for (Type type : {kFloat32, kFloat16, kInt8, kInt4}) {
        std::printf("%s, %s, %d layers, %d heads, %d kv heads, head_dim %d, cache %s\n", isa_name(isa), s.name,
                    s.layers, s.heads, s.kv_heads, s.head_dim,
                    type == kFloat32   ? "f32"
                    : type == kFloat16 ? "f16"
                    : type == kInt8    ? "int8"
                                       : "int4");
        time_prefill(s, type, 512);
        for (int64_t context : {0, 512, 1024, 4096}) time_decode(s, type, context, bandwidth);
      }
    }
  }
}
