#include "formats/affine_search.h"

#define TERSOR_AFFINE_SEARCH affine_search_scalar
#include "formats/affine_search.inc"
