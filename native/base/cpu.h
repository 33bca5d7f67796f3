// Which instruction set the kernels use. Chosen once from the CPU; TERSOR_ISA=<name> or force_isa overrides it.
#pragma once

#include <string>
#include <vector>

namespace tersor {

// In ascending order of speed.
//   scalar:     plain C++, any CPU; the reference for the others
//   avx2:       x86: AVX2 + FMA + F16C
//   avxvnni:    x86: avx2 + AVX-VNNI
//   avx512vnni: x86: avx2 + AVX-512 F, BW, VL, DQ, VNNI
//   amx:        x86: avx512vnni + AVX-512 BF16 + AMX's tiles and their products of bfloat16 and int8
//   neondot:    ARM, 64 bits: ARMv8.2 with the int8 dot products sdot and udot
//   neoni8mm:   ARM: neondot + smmla (I8MM; of ARMv8.6)
enum class Isa { kScalar, kAvx2, kAvxVnni, kAvx512Vnni, kAmx, kNeonDot, kNeonI8mm };

// Name as in TERSOR_ISA.
const char* isa_name(Isa isa);

// What this CPU and operating system can run, ascending. Never empty.
std::vector<Isa> supported_isas();

// The instruction set in use.
Isa active_isa();

// Uses the instruction set of this name from now on ("" = the best). Returns an error text, empty on success.
std::string force_isa(const std::string& name);

// The error text of a bad TERSOR_ISA, empty when it is good or not set.
std::string isa_environment_error();

}  // namespace tersor
