// Picks the kernels of the instruction set in use. For dispatch.cc files, whose namespace has one table per instruction
// set (base/kernel_tables.h).
#pragma once

#include "base/cpu.h"

// AVX-VNNI differs from AVX2 in products of bytes alone, and I8MM from sdot: elsewhere TERSOR_ACTIVE_KERNELS has those.
// TERSOR_ACTIVE_BYTE_KERNELS is for tables with TERSOR_BYTE_KERNEL_TABLES. With AMX both are AVX-512's, unless
// TERSOR_OR_TILE_KERNELS(one of them) asks for what TERSOR_TILE_KERNEL_TABLE has declared.
#if defined(__x86_64__)
#define TERSOR_X86_KERNELS(avxvnni)                        \
  (active_isa() == Isa::kAvx2         ? avx2_kernels       \
   : active_isa() == Isa::kAvxVnni    ? avxvnni            \
   : active_isa() >= Isa::kAvx512Vnni ? avx512vnni_kernels \
                                      : scalar_kernels)
#define TERSOR_ACTIVE_KERNELS() TERSOR_X86_KERNELS(avx2_kernels)
#define TERSOR_ACTIVE_BYTE_KERNELS() TERSOR_X86_KERNELS(avxvnni_kernels)
#elif defined(__aarch64__)
#define TERSOR_ARM_KERNELS(neoni8mm) \
  (active_isa() == Isa::kNeonDot ? neondot_kernels : active_isa() == Isa::kNeonI8mm ? neoni8mm : scalar_kernels)
#define TERSOR_ACTIVE_KERNELS() TERSOR_ARM_KERNELS(neondot_kernels)
#define TERSOR_ACTIVE_BYTE_KERNELS() TERSOR_ARM_KERNELS(neoni8mm_kernels)
#else
#define TERSOR_ACTIVE_KERNELS() (scalar_kernels)
#define TERSOR_ACTIVE_BYTE_KERNELS TERSOR_ACTIVE_KERNELS
#endif

#ifdef TERSOR_HAS_AMX
#define TERSOR_OR_TILE_KERNELS(others) (active_isa() == Isa::kAmx ? amx_kernels : (others))
#else
#define TERSOR_OR_TILE_KERNELS(others) (others)
#endif
