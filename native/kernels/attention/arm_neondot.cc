#if defined(__aarch64__)
#include "base/simd/neondot.h"
#include "kernels/attention/generic.h"

const tersor::attention::Kernels tersor::attention::neondot_kernels = TERSOR_ATTENTION_KERNELS;
#endif
