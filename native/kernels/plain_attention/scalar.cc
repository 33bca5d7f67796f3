#include "base/simd/scalar.h"

#include "kernels/plain_attention/generic.h"

const tersor::plain_attention::Kernels tersor::plain_attention::scalar_kernels = TERSOR_PLAIN_ATTENTION_KERNELS;
