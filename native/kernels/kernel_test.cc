// The tests of the native runtime that need no Python, for any CPU:
//   make test-native    make test-arm    make test-sanitize
// TERSOR_ISA=<name> tests one instruction set instead of all. Exit code 1 when a check fails.
#include "kernels/kernel_test.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "base/cpu.h"
#include "base/threads.h"

namespace tersor::test {
namespace {

constexpr int kMaxTestThreads = 3;
constexpr int kPrinted = 3;  // failures of one kind that are printed

int64_t checks = 0, failures = 0;
std::map<std::string, int> failed;

}  // namespace

uint32_t Random::bits() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 17;
  state_ ^= state_ << 5;
  return state_;
}

float Random::bell() {
  int sum = 0;  // of four uniform bytes: variance 4 * (256^2 - 1) / 12 = 148^2
  for (uint32_t word = bits(); word != 0; word >>= 8) sum += int(word & 255);
  return float(sum - 510) / 148.0f;
}

std::vector<float> Random::bells(int64_t n, float scale) {
  std::vector<float> v(n);
  for (float& x : v) x = bell() * scale;
  return v;
}

std::vector<uint8_t> Random::bytes(int64_t n) {
  std::vector<uint8_t> v(n);
  for (uint8_t& x : v) x = uint8_t(bits() >> 11);
  return v;
}

void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  ++failures;
  if (++failed[what] <= kPrinted) std::printf("FAILED %s\n", what.c_str());
}

void expect_near(const std::string& what, const Result& got, const Expected& want) {
  if (got.size() != want.value.size()) return check(false, what + ": wrong size");
  for (size_t i = 0; i < got.size(); ++i) {
    const double w = want.value[i];
    const bool good =
        std::isnan(w) ? std::isnan(got[i]) : got[i] == w || std::fabs(double(got[i]) - w) <= want.bound[i];
    ++checks;
    if (good) continue;
    char text[160];
    std::snprintf(text, sizeof text, ": value %zu is %.9g, want %.9g within %.3g", i, double(got[i]), w, want.bound[i]);
    return check(false, what + text);
  }
}

const std::vector<std::string>& isas() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> v;
    if (std::getenv("TERSOR_ISA")) {
      v.push_back(isa_name(active_isa()));
    } else {
      for (Isa isa : supported_isas()) v.push_back(isa_name(isa));
    }
    return v;
  }();
  return names;
}

std::vector<Result> expect_everywhere(const std::string& what, const std::function<Result()>& compute,
                                      const Expected& want) {
  return expect_everywhere(what, compute, [&](const std::string&) -> const Expected& { return want; });
}

std::vector<Result> expect_everywhere(const std::string& what, const std::function<Result()>& compute,
                                      const std::function<const Expected&(const std::string& isa)>& want) {
  std::vector<Result> results;
  for (const std::string& isa : isas()) {
    check(force_isa(isa).empty(), "force_isa " + isa);
    for (int n = 1; n <= kMaxTestThreads; ++n) {
      set_threads(n);
      const Result got = compute();
      if (n == 1) {
        expect_near(what + ", " + isa, got, want(isa));
        results.push_back(got);
      } else {
        check(got.size() == results.back().size() && !memcmp(got.data(), results.back().data(), 4 * got.size()),
              what + ", " + isa + ": other bits on " + std::to_string(n) + " threads");
      }
    }
  }
  return results;
}

std::vector<uint8_t> expect_same_bytes(const std::string& what, const std::function<std::vector<uint8_t>()>& compute) {
  std::vector<uint8_t> first;
  for (const std::string& isa : isas()) {
    check(force_isa(isa).empty(), "force_isa " + isa);
    for (int n = 1; n <= kMaxTestThreads; ++n) {
      set_threads(n);
      const std::vector<uint8_t> got = compute();
      if (first.empty()) first = got;
      check(got == first, what + ", " + isa + ": other bytes on " + std::to_string(n) + " threads");
    }
  }
  return first;
}

}  // namespace tersor::test

int main() {
  using namespace tersor::test;
  if (const std::string error = tersor::isa_environment_error(); !error.empty()) {
    std::printf("%s\n", error.c_str());
    return 2;
  }
  std::string names;
  for (const std::string& isa : isas()) names += " " + isa;
  std::printf("instruction sets:%s\n", names.c_str());
  const std::pair<const char*, void (*)()> tests[] = {
      {"threads", test_threads},
      {"memory", test_memory},
      {"float16", test_float16},
      {"float arrays", test_float_arrays},
      {"formats", test_formats},
      {"linear", test_linear},
      {"elementwise", test_elementwise},
      {"attention", test_attention},
      {"plain_attention", test_plain_attention},
      {"logits", test_logits},
      {"grams", test_grams},
  };
  for (const auto& [name, run] : tests) {
    const int64_t before = checks, bad = failures;
    run();
    std::printf("%-12s %8lld checks, %lld failures\n", name, (long long)(checks - before), (long long)(failures - bad));
    std::fflush(stdout);
    check(checks > before, std::string(name) + ": nothing was checked");
  }
  std::printf("bytes of the encoders: %016llx\n", (unsigned long long)encoder_bytes());
  std::printf("%lld checks, %lld failures\n", (long long)checks, (long long)failures);
  return failures != 0;
}
