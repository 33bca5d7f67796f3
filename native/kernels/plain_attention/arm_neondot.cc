#if defined(__aarch64__)
#include "base/simd/neondot.h"
#include "kernels/plain_attention/generic.h"

const tersor::plain_attention::Kernels tersor::plain_attention::neondot_kernels = TERSOR_PLAIN_ATTENTION_KERNELS;
#endif
