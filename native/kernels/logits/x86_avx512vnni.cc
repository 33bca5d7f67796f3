#if defined(__x86_64__)
#include "base/simd/avx512vnni.h"
#include "kernels/logits/generic.h"

const tersor::logits::Kernels tersor::logits::avx512vnni_kernels = TERSOR_LOGITS_KERNELS;
#endif
