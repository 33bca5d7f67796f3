// Picks the kernels of the instruction set in use. For dispatch.cc files, whose namespace has one table per instruction
// set (base/kernel_tables.h).
#pragma once

#include "base/cpu.h"

// TERSOR_ACTIVE_KERNELS runs AVX2's on AVX-VNNI, which differs from it in products of bytes alone;
// TERSOR_ACTIVE_BYTE_KERNELS is for tables with TERSOR_BYTE_KERNEL_TABLES.
#if defined(__x86_64__)
#define TERSOR_X86_KERNELS(avxvnni)                        \
  (active_isa() == Isa::kAvx2         ? avx2_kernels       \
   : active_isa() == Isa::kAvxVnni    ? avxvnni            \
   : active_isa() == Isa::kAvx512Vnni ? avx512vnni_kernels \
                                      : scalar_kernels)
#define TERSOR_ACTIVE_KERNELS() TERSOR_X86_KERNELS(avx2_kernels)
#define TERSOR_ACTIVE_BYTE_KERNELS() TERSOR_X86_KERNELS(avxvnni_kernels)
#elif defined(__aarch64__)
#define TERSOR_ACTIVE_KERNELS() (active_isa() == Isa::kNeonDot ? neondot_kernels : scalar_kernels)
#define TERSOR_ACTIVE_BYTE_KERNELS TERSOR_ACTIVE_KERNELS
#else
#define TERSOR_ACTIVE_KERNELS() (scalar_kernels)
#define TERSOR_ACTIVE_BYTE_KERNELS TERSOR_ACTIVE_KERNELS
#endif
