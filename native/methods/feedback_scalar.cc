#include "methods/feedback_rows.h"

#define TERSOR_FEED_BACK feed_back_scalar
#define TERSOR_DESCEND descend_scalar
#include "methods/feedback.inc"
