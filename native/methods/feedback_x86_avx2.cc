// The body of feedback_scalar.cc compiled for AVX2.
#if defined(__AVX2__)
#include "methods/feedback_rows.h"

#define TERSOR_FEED_BACK feed_back_avx2
#define TERSOR_DESCEND descend_avx2
#include "methods/feedback.inc"
#endif
