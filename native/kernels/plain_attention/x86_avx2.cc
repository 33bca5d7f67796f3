#if defined(__x86_64__)
#include "base/simd/avx2.h"
#include "kernels/plain_attention/generic.h"

const tersor::plain_attention::Kernels tersor::plain_attention::avx2_kernels = TERSOR_PLAIN_ATTENTION_KERNELS;
#endif
