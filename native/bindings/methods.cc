// The column by column loops of the methods: checks shapes, calls native/methods.
#include <nanobind/nanobind.h>

#include "bindings/arrays.h"
#include "methods/feedback.h"
#include "methods/gram.h"
#include "methods/sums.h"

namespace nb = nanobind;

namespace tersor::bindings {
namespace {

template <typename T>
using Changed = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename A>
bool has_shape(const A& array, int64_t rows, int64_t columns) {
  return static_cast<int64_t>(array.shape(0)) == rows && static_cast<int64_t>(array.shape(1)) == columns;
}

LevelGrid grid_of(const Matrix<float>& step, const Matrix<float>& offset, const Vector<int32_t>& group_of,
                  const Vector<float>& levels, int64_t rows, int64_t columns) {
  const int64_t groups = step.shape(1);
  const int n_levels = static_cast<int>(levels.shape(0));
  require(has_shape(step, rows, groups) && has_shape(offset, rows, groups), "step and offset: need (rows, groups)");
  require(static_cast<int64_t>(group_of.shape(0)) == columns, "group_of: need one value per column");
  for (int64_t k = 0; k < columns; k++)
    require(group_of.data()[k] >= 0 && group_of.data()[k] < groups, "group_of: need 0..groups-1");
  require(levels.shape(0) >= 1 && levels.shape(0) <= 256, "levels: need 1 to 256");
  bool integers = true;
  for (int k = 1; k < n_levels; k++) integers = integers && levels.data()[k] - levels.data()[k - 1] == 1.0f;
  return {levels.data(), n_levels, integers, step.data(), offset.data(), groups, group_of.data()};
}

void feed_back(const Matrix<float>& w, const Matrix<float>& feedback, const Matrix<float>& step,
               const Matrix<float>& offset, const Vector<int32_t>& group_of, const Vector<float>& levels,
               const Matrix<float>& target, Changed<uint8_t> indices, Changed<float> errors) {
  const int64_t rows = w.shape(0), columns = w.shape(1);
  const LevelGrid grid = grid_of(step, offset, group_of, levels, rows, columns);
  require(has_shape(feedback, columns, columns), "feedback: need (columns, columns)");
  require(has_shape(target, rows, columns) && has_shape(indices, rows, columns) && has_shape(errors, rows, columns),
          "target, indices and errors: need the shape of w");
  nb::gil_scoped_release release;
  tersor::feed_back(rows, columns, grid, w.data(), feedback.data(), target.data(), indices.data(), errors.data());
}

void descend(const Matrix<float>& hessian, const Matrix<float>& step, const Matrix<float>& offset,
             const Vector<int32_t>& group_of, const Vector<float>& levels, Changed<float> gradient,
             Changed<uint8_t> indices, Changed<float> changes) {
  const int64_t rows = gradient.shape(0), columns = gradient.shape(1);
  const LevelGrid grid = grid_of(step, offset, group_of, levels, rows, columns);
  require(has_shape(hessian, columns, columns), "hessian: need (columns, columns)");
  require(has_shape(indices, rows, columns) && has_shape(changes, rows, columns),
          "indices and changes: need the shape of gradient");
  for (int64_t i = 0; i < rows * columns; i++) require(indices.data()[i] < grid.n_levels, "indices: need 0..levels-1");
  nb::gil_scoped_release release;
  tersor::descend(rows, columns, grid, hessian.data(), gradient.data(), indices.data(), changes.data());
}

template <typename T>
using Sums = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void column_sums(const Matrix<float>& x, Sums<double> squares, Sums<double> magnitudes, Sums<float> absmax) {
  const int64_t rows = x.shape(0), columns = x.shape(1);
  for (const size_t length : {squares.shape(0), magnitudes.shape(0), absmax.shape(0)})
    require(static_cast<int64_t>(length) == columns, "squares, magnitudes and absmax: need one value per column");
  nb::gil_scoped_release release;
  tersor::column_sums(rows, columns, x.data(), squares.data(), magnitudes.data(), absmax.data());
}

void row_products(const Matrix<float>& x, const Matrix<float>& y, Sums<double> products) {
  const int64_t rows = x.shape(0), columns = x.shape(1);
  require(has_shape(y, rows, columns), "y: need the shape of x");
  require(static_cast<int64_t>(products.shape(0)) == rows, "products: need one value per row");
  nb::gil_scoped_release release;
  tersor::row_products(rows, columns, x.data(), y.data(), products.data());
}

void add_gram(const Matrix<float>& x, Changed<double> gram) {
  const int64_t rows = x.shape(0), columns = x.shape(1);
  require(multiplies_by_tiles(), "add_gram: this instruction set has no tiles");
  require(has_shape(gram, columns, columns), "gram: need (columns, columns)");
  nb::gil_scoped_release release;
  tersor::add_gram(rows, columns, x.data(), gram.data());
}

double gram_product(const Matrix<float>& x, const Matrix<double>& gram) {
  const int64_t rows = x.shape(0), columns = x.shape(1);
  require(multiplies_by_tiles(), "gram_product: this instruction set has no tiles");
  require(has_shape(gram, columns, columns), "gram: need (columns, columns)");
  nb::gil_scoped_release release;
  return tersor::gram_product(rows, columns, x.data(), gram.data());
}

}  // namespace
}  // namespace tersor::bindings

void bind_methods(nb::module_& m) {
  namespace b = tersor::bindings;
  m.def("feed_back", &b::feed_back, nb::arg("w"), nb::arg("feedback"), nb::arg("step"), nb::arg("offset"),
        nb::arg("group_of"), nb::arg("levels"), nb::arg("target"), nb::arg("indices"), nb::arg("errors"),
        "Rounds the columns of w (rows, n) one by one, each one's error fed back into the targets (rows, n) of the "
        "next; writes indices of levels and errors, both (rows, n).");
  m.def("descend", &b::descend, nb::arg("hessian"), nb::arg("step"), nb::arg("offset"), nb::arg("group_of"),
        nb::arg("levels"), nb::arg("gradient"), nb::arg("indices"), nb::arg("changes"),
        "One sweep of coordinate descent over the columns of indices (rows, n); writes what their values moved by.");
  m.def("column_sums", &b::column_sums, nb::arg("x"), nb::arg("squares"), nb::arg("magnitudes"), nb::arg("absmax"),
        "Adds the columns of x (rows, columns): x^2 and |x| to the float64 sums (columns,), the largest |x| to "
        "absmax.");
  m.def(
      "row_products", &b::row_products, nb::arg("x"), nb::arg("y"), nb::arg("products"),
      "Writes the inner product of each row of x with that of y, both (rows, columns), to products, (rows,) float64.");
  m.def("multiplies_by_tiles", &tersor::multiplies_by_tiles,
        "Returns whether this CPU has what add_gram and gram_product need.");
  m.def("add_gram", &b::add_gram, nb::arg("x"), nb::arg("gram"),
        "Adds x^T x, x (rows, columns), to the lower triangle of gram, (columns, columns) float64.");
  m.def("gram_product", &b::gram_product, nb::arg("x"), nb::arg("gram"),
        "Returns tr(x gram x^T), x (rows, columns), gram (columns, columns) float64 and symmetric.");
}
