// Some rows' part of a tile; the same code for each instruction set (feedback.inc), chosen by feedback.cc.
#pragma once

#include <cstdint>

#include "methods/feedback.h"

namespace tersor {

constexpr int kLanes = 8;  // rows at a time

struct TileRows {
  int64_t rows[kLanes];
  int count;  // of rows to write; those after them repeat the last
  int64_t columns;
  float* scratch;  // 3 * columns * kLanes
};

void feed_back_scalar(const TileRows& tile, const LevelGrid& grid, const float* w, const float* feedback,
                      const float* target, uint8_t* indices, float* errors);
void descend_scalar(const TileRows& tile, const LevelGrid& grid, const float* hessian, float* gradient,
                    uint8_t* indices, float* changes);
void feed_back_avx2(const TileRows& tile, const LevelGrid& grid, const float* w, const float* feedback,
                    const float* target, uint8_t* indices, float* errors);
void descend_avx2(const TileRows& tile, const LevelGrid& grid, const float* hessian, float* gradient, uint8_t* indices,
                  float* changes);

}  // namespace tersor
