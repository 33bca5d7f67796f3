#include "base/cpu.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tersor {
namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2,    Isa::kAvxVnni, Isa::kAvx512Vnni,
                        Isa::kAmx,    Isa::kNeonDot, Isa::kNeonI8mm};

#if defined(__x86_64__)

struct Features {
  bool avx2 = false, avxvnni = false, avx512vnni = false, amx = false;
};

// Register state that the operating system saves (XCR0): bit 1 SSE, 2 AVX, 5..7 AVX-512, 17 and 18 tiles (Intel SDM
// vol. 1, 13.3).
uint64_t saved_state() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Asks Linux for the tiles' state, which a process has from then on (Linux, Documentation/arch/x86/xstate.rst).
[[maybe_unused]] bool may_use_tiles() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features f;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c >> 27 & 1, avx = c >> 28 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !avx || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const uint64_t saved = saved_state();
  f.avx2 = (saved & 0x6) == 0x6 && fma && f16c && (b >> 5 & 1);
  const bool f512 = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vnni = c >> 11 & 1;
  f.avx512vnni = f.avx2 && (saved & 0xe6) == 0xe6 && f512 && dq && bw && vl && vnni;
  [[maybe_unused]] const bool tiles = (saved & 0x60000) == 0x60000 && (d >> 24 & 1) && (d >> 25 & 1) && (d >> 22 & 1);
  if (a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) a = 0;
#ifdef TERSOR_HAS_AVXVNNI
  f.avxvnni = f.avx2 && (a >> 4 & 1);
#endif
#ifdef TERSOR_HAS_AMX
  f.amx = f.avx512vnni && tiles && (a >> 5 & 1) && may_use_tiles();
#endif
#ifdef TERSOR_EMULATE
  f.avxvnni = f.avx512vnni = f.amx = true;
#endif
  return f;
}

bool supported(Isa isa) {
  static const Features features = detect();
  if (isa == Isa::kAvx2) return features.avx2;
  if (isa == Isa::kAvxVnni) return features.avxvnni;
  if (isa == Isa::kAvx512Vnni) return features.avx512vnni;
  if (isa == Isa::kAmx) return features.amx;
  return isa == Isa::kScalar;
}

#elif defined(__aarch64__) && defined(__linux__)

bool supported(Isa isa) {
  static const bool neondot = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
  static const bool neoni8mm = neondot && getauxval(AT_HWCAP2) & HWCAP2_I8MM;
  return isa == Isa::kScalar || (isa == Isa::kNeonDot && neondot) || (isa == Isa::kNeonI8mm && neoni8mm);
}

#else

bool supported(Isa isa) { return isa == Isa::kScalar; }

#endif

struct Choice {
  std::atomic<Isa> isa{supported_isas().back()};
  std::string error;  // of TERSOR_ISA
};

std::string choose(Choice& choice, const std::string& name) {
  if (name.empty()) {
    choice.isa = supported_isas().back();
    return "";
  }
  std::string known;
  for (Isa isa : supported_isas()) {
    if (name == isa_name(isa)) {
      choice.isa = isa;
      return "";
    }
    known += (known.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  bool exists = false;
  for (Isa isa : kAll) exists |= name == isa_name(isa);
  return (exists ? "this CPU cannot run instruction set '" : "unknown instruction set '") + name +
         "'; this CPU has: " + known;
}

Choice& the_choice() {
  static Choice* choice = [] {
    auto* c = new Choice;
    if (const char* name = std::getenv("TERSOR_ISA")) {
      c->error = choose(*c, name);
      if (!c->error.empty()) c->error = "TERSOR_ISA: " + c->error;
    }
    return c;
  }();
  return *choice;
}

}  // namespace

const char* isa_name(Isa isa) {
  if (isa == Isa::kAvx2) return "avx2";
  if (isa == Isa::kAvxVnni) return "avxvnni";
  if (isa == Isa::kAvx512Vnni) return "avx512vnni";
  if (isa == Isa::kAmx) return "amx";
  if (isa == Isa::kNeonDot) return "neondot";
  if (isa == Isa::kNeonI8mm) return "neoni8mm";
  return "scalar";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> found;
  for (Isa isa : kAll)
    if (supported(isa)) found.push_back(isa);
  return found;
}

Isa active_isa() { return the_choice().isa.load(std::memory_order_relaxed); }

std::string force_isa(const std::string& name) { return choose(the_choice(), name); }

std::string isa_environment_error() { return the_choice().error; }

}  // namespace tersor
