// Declares the table of kernels of every instruction set that this build has; one is picked by base/isa_table.h. For
// kernels.h files, within their namespace, after their struct Kernels: TERSOR_KERNEL_TABLES, or
// TERSOR_BYTE_KERNEL_TABLES where products of bytes make AVX-VNNI and NEON's I8MM sets of their own; and
// TERSOR_TILE_KERNEL_TABLE where AMX's tiles do.
#pragma once

#if defined(__x86_64__)
#define TERSOR_KERNEL_TABLES           \
  extern const Kernels scalar_kernels; \
  extern const Kernels avx2_kernels;   \
  extern const Kernels avx512vnni_kernels;
#define TERSOR_BYTE_KERNEL_TABLES \
  TERSOR_KERNEL_TABLES            \
  extern const Kernels avxvnni_kernels;
#elif defined(__aarch64__)
#define TERSOR_KERNEL_TABLES           \
  extern const Kernels scalar_kernels; \
  extern const Kernels neondot_kernels;
#define TERSOR_BYTE_KERNEL_TABLES \
  TERSOR_KERNEL_TABLES            \
  extern const Kernels neoni8mm_kernels;
#else
#define TERSOR_KERNEL_TABLES extern const Kernels scalar_kernels;
#define TERSOR_BYTE_KERNEL_TABLES TERSOR_KERNEL_TABLES
#endif

#ifdef TERSOR_HAS_AMX
#define TERSOR_TILE_KERNEL_TABLE extern const Kernels amx_kernels;
#else
#define TERSOR_TILE_KERNEL_TABLE
#endif
