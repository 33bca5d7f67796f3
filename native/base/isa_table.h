// Picks the kernels of the instruction set in use. For dispatch.cc files, whose namespace has one table per instruction
// set.
#pragma once

#include "base/cpu.h"

#if defined(__x86_64__)
#define TERSOR_ACTIVE_KERNELS() \
  (active_isa() == Isa::kAvx2 ? avx2_kernels : active_isa() == Isa::kAvx512Vnni ? avx512vnni_kernels : scalar_kernels)
#elif defined(__aarch64__)
#define TERSOR_ACTIVE_KERNELS() (active_isa() == Isa::kNeonDot ? neondot_kernels : scalar_kernels)
#else
#define TERSOR_ACTIVE_KERNELS() (scalar_kernels)
#endif
