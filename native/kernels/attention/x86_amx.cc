#if defined(__x86_64__) && defined(TERSOR_HAS_AMX)
#include "base/simd/amx.h"
#include "kernels/attention/generic.h"
#include "kernels/attention/generic_matrix.h"

const tersor::attention::Kernels tersor::attention::amx_kernels = TERSOR_ATTENTION_KERNELS_WITH(attend_tiles);
#endif
