// ISA and threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "base/bandwidth.h"
#include "base/cpu.h"
#include "base/memory.h"
#include "base/threads.h"
#include "kernels/peak/peak.h"

namespace nb = nanobind;

void bind_base(nb::module_& m) {
  if (const std::string error = tersor::isa_environment_error(); !error.empty()) throw std::runtime_error(error);

  m.def(
      "isa", [] { return std::string(tersor::isa_name(tersor::active_isa())); },
      "The instruction set that the kernels use.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (tersor::Isa isa : tersor::supported_isas()) names.emplace_back(tersor::isa_name(isa));
        return names;
      },
      "Instruction sets this CPU can run, slowest first.");
  m.def(
      "force_isa",
      [](const std::string& name) {
        if (const std::string error = tersor::force_isa(name); !error.empty()) throw nb::value_error(error.c_str());
      },
      nb::arg("name"),
      "Uses this instruction set from now on; '' is the best one. ValueError lists what this CPU has.");
  m.def(
      "set_threads",
      [](int n) {
        if (n < 1 || n > tersor::kMaxThreads) {
          const std::string text =
              "threads: got " + std::to_string(n) + ", need 1 to " + std::to_string(tersor::kMaxThreads);
          throw nb::value_error(text.c_str());
        }
        tersor::set_threads(n);
      },
      nb::arg("n"), "Sets the number of threads of all native loops, the caller included.");
  m.def("threads", &tersor::threads, "Number of threads of native loops; at first the CPUs this process may use.");
  m.def("run_alone", &tersor::run_alone, nb::arg("alone"),
        "Whether native loops of the calling thread run on it alone.");
  m.def(
      "read_words",
      [](nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> words) {
        nb::gil_scoped_release release;
        return tersor::read_words(words.data(), static_cast<int64_t>(words.shape(0)));
      },
      nb::arg("words"),
      "Reads all words with all threads and returns their sum modulo 2^64: for measuring the memory's bandwidth.");
  m.def(
      "empty",
      [](const std::vector<size_t>& shape) {
        size_t size = sizeof(float);
        for (size_t n : shape) size *= n;
        uint8_t* memory = tersor::allocate(int64_t(size));
        nb::capsule owner(memory, [](void* p) noexcept { tersor::release(static_cast<uint8_t*>(p)); });
        return nb::ndarray<nb::numpy, float>(memory, shape.size(), shape.data(), owner);
      },
      nb::arg("shape"), "A float32 array whose values are not set, on large pages.");
  m.def(
      "multiply_bytes",
      [](int64_t rounds) {
        if (rounds < 1) throw nb::value_error("multiply_bytes: rounds must be positive");
        nb::gil_scoped_release release;
        return tersor::peak::multiply_bytes(rounds);
      },
      nb::arg("rounds"),
      "Lets all threads do nothing but products of bytes in registers and returns the operations done, a "
      "multiplication "
      "and an addition being two: for measuring the peak of integer kernels.");
}
