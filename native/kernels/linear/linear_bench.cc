// Speed of `linear` beside this machine's limits, for every kernel and instruction set.
//   cmake --build build/dev --target linear_bench && build/dev/linear_bench [threads] [rows] [columns]
// Times are CPU time per thread, the least of several rounds, so that other work on the machine disturbs little.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <vector>

#include "base/bandwidth.h"
#include "base/cpu.h"
#include "base/threads.h"
#include "kernels/linear/linear.h"

using namespace tersor;
using namespace tersor::linear;

namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

double seconds(const std::function<void()>& f) {
  f();
  double best = 1e9;
  for (int round = 0; round < 7; ++round) {
    int calls = 0;
    const double start = now();
    double end;
    do {
      f();
      ++calls;
      end = now();
    } while (end - start < 0.02);
    best = std::min(best, (end - start) / calls);
  }
  return best / threads();
}

Part make_part(bool integer, Float type, Code code, int group, Second second, int64_t rows, int64_t columns) {
  static const int8_t kTable[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  const int64_t panel_bytes =
      integer ? columns / group * block_bytes(code, group, second) : columns * 16 * float_bytes(type);
  const int64_t panels = (rows + 15) / 16;
  const float offset = code == kS8 || code == kT4 ? 0 : -8;
  Part part{rows, columns, integer, type, code, group, second, offset, kTable, panel_bytes, Bytes(panels * panel_bytes),
            {},   {}};
  for (int64_t i = 0; i < panels * panel_bytes; ++i) part.panels.data()[i] = uint8_t(i * 2654435761u >> 13) & 0x3f;
  part.scale.assign(panels * 16, 1.0f);
  return part;
}

void run(const char* name, bool integer, Float type, Code code, int group, Second second, int64_t rows,
         int64_t columns) {
  Weight weight;
  weight.rows = rows;
  weight.columns = columns;
  weight.parts.push_back(make_part(integer, type, code, group, second, rows, columns));
  std::printf("%-14s", name);
  for (int64_t n : {1, 2, 4, 8, 32, 512}) {
    std::vector<float> x(n * columns), y(n * rows);
    for (size_t i = 0; i < x.size(); ++i) x[i] = float(int(i * 2654435761u >> 20) % 200 - 100) / 100;
    const double t = seconds([&] { multiply(x.data(), n, weight, nullptr, y.data()); });
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
    const double t = seconds([&] { sink += read_words(words.data(), int64_t(words.size())); });
    std::printf("reading %lld MiB: %.1f GB/s\n", (long long)mib, double(sink ? mib << 20 : 0) / t * 1e-9);
  }
  for (Isa isa : supported_isas()) {
    force_isa(isa_name(isa));
    std::printf("\n%s: GB/s of weights at n = 1 | GMAC/s at n = 1, 2, 4, 8, 32, 512\n", isa_name(isa));
    run("u4x32", true, kF32, kU4, 32, kNone, rows, columns);
    run("u4x32min", true, kF32, kU4, 32, kMin, rows, columns);
    run("u4x16min", true, kF32, kU4, 16, kMin, rows, columns);
    run("t4x32", true, kF32, kT4, 32, kNone, rows, columns);
    run("u6x16", true, kF32, kU6, 16, kNone, rows, columns);
    run("u6x32min", true, kF32, kU6, 32, kMin, rows, columns);
    run("s8x32", true, kF32, kS8, 32, kNone, rows, columns);
    run("f32", false, kF32, kU4, 0, kNone, rows, columns);
    run("f16", false, kF16, kU4, 0, kNone, rows, columns);
    run("bf16", false, kBF16, kU4, 0, kNone, rows, columns);
  }
}
