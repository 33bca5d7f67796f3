// Memory on large pages: weights, activations and caches are read all over again and again, and every page of 4 KiB
// costs an address translation, which a virtual machine makes several times dearer. Blocks of any size share regions of
// large pages, so that small ones have them too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace tersor {

// `size` bytes that start on a cache line. Throws std::bad_alloc. From any thread.
uint8_t* allocate(int64_t size);
void release(uint8_t* p);

// What allocate holds from the operating system, in bytes of address space.
int64_t reserved_bytes();

class Bytes {
 public:
  explicit Bytes(int64_t size) : data_(allocate(size)), size_(size) {}
  uint8_t* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { release(p); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  int64_t size_;
};

// std::vector's allocator. What resize adds is not set.
template <typename T>
struct LargePages {
  using value_type = T;
  LargePages() = default;
  template <typename U>
  LargePages(const LargePages<U>&) {}
  T* allocate(size_t n) { return reinterpret_cast<T*>(tersor::allocate(int64_t(n * sizeof(T)))); }
  void deallocate(T* p, size_t) { release(reinterpret_cast<uint8_t*>(p)); }
  template <typename U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
  template <typename U, typename... Arguments>
  void construct(U* p, Arguments&&... arguments) {
    ::new (static_cast<void*>(p)) U(std::forward<Arguments>(arguments)...);
  }
  bool operator==(const LargePages&) const { return true; }
};
template <typename T>
using LargeVector = std::vector<T, LargePages<T>>;

}  // namespace tersor
