// Weights that one row is multiplied by are asked for before they are read, where the CPU's own reading ahead does not
// keep up. Every header of an instruction set says how far, as kAhead.
#pragma once

namespace tersor {

struct Ahead {
  int least_bits;  // of codes: those of fewer are left to the CPU
  int codes;       // bytes
  int near;        // bytes, from the outer cache into the inner one; 0: left to the CPU
  int floats;      // bytes of each of the panels that are read together; 0: left to the CPU
};

}  // namespace tersor
