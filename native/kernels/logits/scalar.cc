#include "base/simd/scalar.h"

#include "kernels/logits/generic.h"

const tersor::logits::Kernels tersor::logits::scalar_kernels = TERSOR_LOGITS_KERNELS;
