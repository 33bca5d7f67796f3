// Speed of `linear` beside this machine's limits, for every kernel and instruction set.
//   cmake --build build/dev --target linear_bench && [TERSOR_ISA=avx2] build/dev/linear_bench [threads] [rows]
//   [columns]
// Times are CPU time per thread, the least of several rounds, so that other work on the machine disturbs little.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/bandwidth.h"
#include "base/cpu.h"
#include "base/cpu_seconds.h"
#include "base/threads.h"
#include "kernels/linear/linear.h"

using namespace tersor;
using namespace tersor::linear;

namespace {

constexpr int8_t kTable[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct Case {
  const char* name;
  bool integer;
  Float floating;
  Layout layout;
};

const Case kCases[] = {
    {"q4_0", true, kF32, {kU4, kHalves, kNone, 32, -8, nullptr}},
    {"q4_1", true, kF32, {kU4, kHalves, kMin, 32, 0, nullptr}},
    {"q8_0", true, kF32, {kS8, kHalves, kNone, 32, 0, nullptr}},
    {"q5_0", true, kF32, {kU5, kHalves, kNone, 32, -16, nullptr}},
    {"int4_g64", true, kF32, {kU4, kHalves, kZero, 64, 0, nullptr}},
    {"q2_k", true, kF32, {kU2, kNibbles, kMin, 16, 0, nullptr}},
    {"q3_k", true, kF32, {kU3, kSuper, kNone, 16, -4, nullptr}},
    {"q4_k", true, kF32, {kU4, kSuper, kMin, 32, 0, nullptr}},
    {"q6_k", true, kF32, {kU6, kSuper, kNone, 16, -32, nullptr}},
    {"iq4_xs", true, kF32, {kT4, kSuper, kNone, 32, 0, kTable}},
    {"binary_g128", true, kF32, {kU1, kHalves, kNone, 128, -1, nullptr}},
    {"f32", false, kF32, {}},
    {"f16", false, kF16, {}},
    {"bf16", false, kBF16, {}},
    {"fp8_c", false, kE4M3, {}},
};

Part make_part(const Case& c, int64_t rows, int64_t columns) {
  const int64_t size = c.integer ? panel_bytes(c.layout, columns) : columns * 16 * float_bytes(c.floating);
  const int64_t panels = (rows + 15) / 16;
  Part part{rows, columns, c.integer, c.layout, nullptr, c.floating, size, Bytes(panels * size), {}};
  for (int64_t i = 0; i < panels * size; ++i) {
    const auto byte = uint8_t(i * 2654435761u >> 13);
    part.panels.data()[i] = c.integer ? byte & 0x3f : 0x3c | (byte & 3);  // floats that are not subnormal
  }
  part.scale.assign(panels * 16, 1.0f);
  return part;
}

void run(const Case& c, int64_t rows, int64_t columns) {
  Weight weight;
  weight.rows = rows;
  weight.columns = columns;
  weight.parts.push_back(make_part(c, rows, columns));
  std::printf("%-12s", c.name);
  for (int64_t n : {1, 2, 4, 16, 32, 512}) {
    std::vector<float> x(n * columns);
    const Bytes y(n * rows * 4);
    for (size_t i = 0; i < x.size(); ++i) x[i] = float(int(i * 2654435761u >> 20) % 200 - 100) / 100;
    const double t = cpu_seconds([&] { multiply(x.data(), n, weight, nullptr, reinterpret_cast<float*>(y.data())); });
    if (n == 1) std::printf(" %6.1f GB/s |", double(weight.nbytes()) / t * 1e-9);
    std::printf(" %6.1f", double(n) * double(rows) * double(columns) / t * 1e-9);
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  set_threads(argc > 1 ? std::atoi(argv[1]) : 1);
  const int64_t rows = argc > 2 ? std::atoi(argv[2]) : 1536, columns = argc > 3 ? std::atoi(argv[3]) : 576;
  std::printf("%d threads, weight %lld x %lld\n", threads(), (long long)rows, (long long)columns);
  for (int64_t mib : {1, 8, 256}) {
    const std::vector<uint64_t> words(mib << 17, 1);
    uint64_t sink = 0;
    const double t = cpu_seconds([&] { sink += read_words(words.data(), int64_t(words.size())); });
    std::printf("reading %lld MiB: %.1f GB/s\n", (long long)mib, double(sink ? mib << 20 : 0) / t * 1e-9);
  }
  const char* only = std::getenv("TERSOR_ISA");
  for (Isa isa : supported_isas()) {
    if (only && std::string(only) != isa_name(isa)) continue;
    force_isa(isa_name(isa));
    std::printf("\n%s: GB/s of weights at n = 1 | GMAC/s at n = 1, 2, 4, 16, 32, 512\n", isa_name(isa));
    for (const Case& c : kCases) run(c, rows, columns);
  }
}
