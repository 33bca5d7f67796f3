#include "base/memory.h"

#include <cstring>
#include <thread>

#include "kernels/kernel_test.h"

namespace tersor::test {
namespace {

// Blocks of random sizes come and go; each keeps what was written to it, starts on a line, and overlaps no other.
// Returns how often that does not hold.
int come_and_go(uint32_t seed) {
  Random random{seed};
  struct Block {
    Bytes bytes;
    uint8_t mark;
  };
  std::vector<Block> blocks;
  const auto intact = [](const Block& b) {
    for (int64_t i = 0; i < b.bytes.size(); i += 61)
      if (b.bytes.data()[i] != b.mark) return false;
    return b.bytes.size() == 0 || b.bytes.data()[b.bytes.size() - 1] == b.mark;
  };
  int faults = 0;
  for (int i = 0; i < 2000; ++i) {
    if (blocks.empty() || random.below(100) < 55) {
      const int64_t size = random.below(100) == 0 ? random.below(80 << 20) : random.below(1 << random.below(20));
      blocks.push_back({Bytes(size), uint8_t(i)});
      Bytes& b = blocks.back().bytes;
      faults += reinterpret_cast<uintptr_t>(b.data()) % 64 != 0;
      if (size > 0) memset(b.data(), blocks.back().mark, size_t(size));
    } else {
      const int at = random.below(int(blocks.size()));
      faults += !intact(blocks[at]);
      std::swap(blocks[at], blocks.back());
      blocks.pop_back();
    }
  }
  for (const Block& b : blocks) faults += !intact(b);
  return faults;
}

}  // namespace

void test_memory() {
  const int64_t before = reserved_bytes();
  int faults[4] = {};
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < 4; ++i) threads.emplace_back([&faults, i] { faults[i] = come_and_go(i + 1); });
  for (std::thread& t : threads) t.join();
  for (int f : faults) check(f == 0, "memory: a block is not on a line, or was written to");
  check(reserved_bytes() <= before + (160 << 20), "memory: more is kept than is spare");
  {
    const Bytes small(100), large(int64_t(600) << 20);
    check(reserved_bytes() >= int64_t(600) << 20, "memory: less than what is held");
  }
  check(reserved_bytes() < before + (600 << 20), "memory: a large block stays");
  LargeVector<float> v(3, 7.0f);
  v.resize(5000);
  check(v[0] == 7 && v[2] == 7, "memory: a vector's values moved wrongly");
}

}  // namespace tersor::test
