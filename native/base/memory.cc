#include "base/memory.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tersor {
namespace {

constexpr int64_t kLine = 64, kLargePage = 2 << 20;
constexpr int64_t kRegion = 32 << 20;  // of address space, at least; what is not touched costs nothing
constexpr int64_t kSpare = 128 << 20;  // unused regions that are kept: what one product frees the next one takes

int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Free ranges are kept by their beginning; neighbours are joined.
struct Region {
  int64_t size;
  std::map<int64_t, int64_t> free;  // offset, size
  int64_t used = 0;                 // bytes

  // The first range that fits, or -1.
  int64_t take(int64_t n) {
    if (size - used < n) return -1;
    for (auto it = free.begin(); it != free.end(); ++it) {
      const auto [offset, length] = *it;
      if (length < n) continue;
      free.erase(it);
      if (length > n) free.emplace(offset + n, length - n);
      used += n;
      return offset;
    }
    return -1;
  }

  void give_back(int64_t offset, int64_t n) {
    used -= n;
    auto next = free.lower_bound(offset);
    if (next != free.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        offset = before->first;
        n += before->second;
        free.erase(before);
      }
    }
    if (next != free.end() && offset + n == next->first) {
      n += next->second;
      free.erase(next);
    }
    free.emplace(offset, n);
  }
};

class Heap {
 public:
  uint8_t* allocate(int64_t size) {
    const std::lock_guard lock(mutex_);
    const int64_t n = std::max(kLine, rounded_up(size, kLine));
    for (auto& [base, region] : regions_) {
      if (const int64_t offset = region.take(n); offset >= 0) return remember(base + offset, n);
    }
    // Larger and larger, since each may leave most of a large page unused.
    const int64_t all = rounded_up(std::max({kRegion, reserved_ / 2, n}), kLargePage);
    auto* base = static_cast<uint8_t*>(std::aligned_alloc(kLargePage, all));
    if (!base) throw std::bad_alloc();
#ifdef __linux__
    madvise(base, all, MADV_HUGEPAGE);  // only a hint
#endif
    Region& region = regions_.emplace(base, Region{all, {{0, all}}}).first->second;
    reserved_ += all;
    return remember(base + region.take(n), n);
  }

  void release(uint8_t* p) {
    if (!p) return;
    const std::lock_guard lock(mutex_);
    const auto block = sizes_.find(p);
    const auto it = std::prev(regions_.upper_bound(p));
    it->second.give_back(p - it->first, block->second);
    sizes_.erase(block);
    if (it->second.used > 0) return;
    // An empty region stays while few do.
    int64_t spare = 0;
    for (const auto& [base, region] : regions_) spare += region.used == 0 ? region.size : 0;
    if (spare <= kSpare) return;
    reserved_ -= it->second.size;
    std::free(it->first);
    regions_.erase(it);
  }

  int64_t reserved() {
    const std::lock_guard lock(mutex_);
    return reserved_;
  }

 private:
  uint8_t* remember(uint8_t* p, int64_t n) {
    sizes_.emplace(p, n);
    return p;
  }

  std::mutex mutex_;
  std::map<uint8_t*, Region> regions_;
  std::map<uint8_t*, int64_t> sizes_;
  int64_t reserved_ = 0;
};

// Never destroyed: threads and Python objects may release after main.
Heap& heap() {
  static Heap* const one = new Heap;
  return *one;
}

}  // namespace

uint8_t* allocate(int64_t size) { return heap().allocate(size); }

void release(uint8_t* p) { heap().release(p); }

int64_t reserved_bytes() { return heap().reserved(); }

}  // namespace tersor
