#if defined(__x86_64__)
#include "base/simd/avx2.h"
#include "kernels/logits/generic.h"

const tersor::logits::Kernels tersor::logits::avx2_kernels = TERSOR_LOGITS_KERNELS;
#endif
