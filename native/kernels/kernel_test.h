// What the files of kernel_test share. Each *_test.cc is about one op; kernel_test.cc runs them.
//
// Every result is computed on every instruction set under test and on 1, 2 and 3 threads. It must lie within a bound of
// an oracle in float64 (plain loops in the test), and have the same bits for any number of threads. Bounds are counted
// in roundings of float32, kRounding of a value each: n additions or multiplications of terms whose magnitudes sum to S
// err by at most n * kRounding * S (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace tersor::test {

inline constexpr double kRounding = 0x1p-24;  // half the distance of neighbouring float32 values, relative

// Numbers that are the same on every platform: integer arithmetic only (xorshift32, Marsaglia 2003).
class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed * 2654435761u | 1) {}
  uint32_t bits();
  int below(int n) { return int(bits() >> 8) % n; }
  float bell();  // mean 0, variance 1, within 3.5
  std::vector<float> bells(int64_t n, float scale = 1);
  std::vector<uint8_t> bytes(int64_t n);

 private:
  uint32_t state_;
};

// Counts a check; prints the first failures of each kind.
void check(bool good, const std::string& what);

// What a result should be, value by value, and how far from it it may be.
struct Expected {
  std::vector<double> value, bound;

  void add(double v, double b) {
    value.push_back(v);
    bound.push_back(b);
  }
};

using Result = std::vector<float>;

// Not-a-numbers must be where they are expected; infinities and bounds of 0 mean equality.
void expect_near(const std::string& what, const Result& got, const Expected& want);

// The instruction sets under test: all of this CPU, or the one that TERSOR_ISA names.
const std::vector<std::string>& isas();

// Runs `compute` with every instruction set of isas() and on 1 to 3 threads, and compares each result with `want`.
// Returns the result of each instruction set.
std::vector<Result> expect_everywhere(const std::string& what, const std::function<Result()>& compute,
                                      const Expected& want);
// The same where what is wanted depends on the instruction set.
std::vector<Result> expect_everywhere(const std::string& what, const std::function<Result()>& compute,
                                      const std::function<const Expected&(const std::string& isa)>& want);

// Likewise for bytes, which must be the same everywhere. Returns them.
std::vector<uint8_t> expect_same_bytes(const std::string& what, const std::function<std::vector<uint8_t>()>& compute);

void test_threads();
void test_memory();
void test_float16();
void test_float_arrays();
void test_formats();
void test_linear();
void test_attention();
void test_plain_attention();
void test_elementwise();
void test_logits();
void test_grams();

// FNV-1a of all bytes that the encoders of test_formats wrote: the same on every CPU.
uint64_t encoder_bytes();

}  // namespace tersor::test
