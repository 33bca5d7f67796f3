// The most products of bytes that a core can do: what every instruction set provides.
#pragma once

#include <cstdint>

#include "base/kernel_tables.h"

namespace tersor::peak {

struct Kernels {
  // Does the instructions that the integer kernels are made of, on registers only, in chains that do not wait for each
  // other; returns something that depends on all of them.
  uint32_t (*multiply)(int64_t rounds, const uint8_t* bytes);
  int64_t operations;  // of a round: a multiplication and an addition are two
};

inline constexpr int kBytes = 1024;  // that multiply may read

TERSOR_BYTE_KERNEL_TABLES
TERSOR_TILE_KERNEL_TABLE

}  // namespace tersor::peak
