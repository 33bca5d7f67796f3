#if defined(__aarch64__)
#include "base/simd/neondot.h"
#include "kernels/logits/generic.h"

const tersor::logits::Kernels tersor::logits::neondot_kernels = TERSOR_LOGITS_KERNELS;
#endif
