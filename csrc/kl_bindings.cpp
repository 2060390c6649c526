// full_kl for Python: argument checks, and release of the interpreter lock.
#include "kl.h"
#include "numpy.h"

namespace py = pybind11;

namespace twinhead {
namespace {

// T is what a logit is; Element is how numpy, which has no bfloat16, stores one.
template <typename T, typename Element>
RowsOf<T> rows_of(const py::array_t<Element, 0>& logits, void* data, const char* name, std::int64_t rows,
                  std::int64_t words) {
  constexpr std::int64_t kWidth = sizeof(Element);
  expect(logits.ndim() == 2, std::string("kl: expected ") + name + " (n, V), got another number of dimensions");
  expect_length("kl", name, rows, logits.shape(0));
  expect_length("kl", "a row", words, logits.shape(1));
  const bool without_gaps = logits.size() == 0 || words == 1 || logits.strides(1) == kWidth;
  expect(without_gaps && logits.strides(0) % kWidth == 0, "kl: expected the words of a row side by side, got gaps");
  return {static_cast<T*>(data), logits.strides(0) / kWidth};
}

template <typename T, typename Element>
RowsOf<const T> read(const py::array_t<Element, 0>& logits, const char* name, std::int64_t rows, std::int64_t words) {
  const RowsOf<T> found = rows_of<T>(logits, const_cast<Element*>(logits.data()), name, rows, words);
  return {found.data, found.stride};
}

template <typename T, typename Element>
RowsOf<T> written(std::optional<py::array_t<Element, 0>>& slopes, const char* name, std::int64_t rows,
                  std::int64_t words) {
  return slopes ? rows_of<T>(*slopes, slopes->mutable_data(), name, rows, words) : RowsOf<T>{nullptr, 0};
}

template <typename T, typename Element>
Divergence<T> divergence_of(const py::array_t<Element, 0>& p, const py::array_t<Element, 0>& q, double temperature,
                            int threads, Numpy<typename Divergence<T>::Real>& moments) {
  expect(p.ndim() == 2 && p.shape(1) > 0, "kl: expected p (n, V), V > 0, got another shape");
  const std::int64_t rows = p.shape(0), words = p.shape(1);
  expect_length("kl", "moments", 5 * rows, moments.size());
  expect(temperature > 0, "kl: expected temperature > 0, got " + std::to_string(temperature));
  expect(threads >= 1, "kl: expected threads >= 1, got " + std::to_string(threads));
  return {read<T>(p, "p", rows, words), read<T>(q, "q", rows, words), rows, words, temperature,
          writable(moments)};
}

template <typename T, typename Element>
void measure_of_numpy(const py::array_t<Element, 0>& p, const py::array_t<Element, 0>& q, double temperature,
                      int threads, Numpy<typename Divergence<T>::Real> kl,
                      Numpy<typename Divergence<T>::Real> moments) {
  const Divergence<T> divergence = divergence_of<T>(p, q, temperature, threads, moments);
  expect_length("kl", "kl", divergence.rows, kl.size());
  const Array<typename Divergence<T>::Real> found = writable(kl);
  const py::gil_scoped_release unlocked;
  measure_kl(divergence, found, threads);
}

template <typename T, typename Element>
void gradient_of_numpy(const py::array_t<Element, 0>& p, const py::array_t<Element, 0>& q, double temperature,
                       int threads, Numpy<typename Divergence<T>::Real> moments,
                       const Numpy<typename Divergence<T>::Real>& slopes,
                       std::optional<py::array_t<Element, 0>> dp, std::optional<py::array_t<Element, 0>> dq) {
  const Divergence<T> divergence = divergence_of<T>(p, q, temperature, threads, moments);
  expect_length("kl", "slopes", divergence.rows, slopes.size());
  const RowsOf<T> to_p = written<T>(dp, "dp", divergence.rows, divergence.words);
  const RowsOf<T> to_q = written<T>(dq, "dq", divergence.rows, divergence.words);
  const py::gil_scoped_release unlocked;
  kl_gradient(divergence, readable(slopes), to_p, to_q, threads);
}

template <typename T, typename Element>
void define(py::module_& module) {
  module.def("kl", &measure_of_numpy<T, Element>, exact("p"), exact("q"), py::arg("temperature"), py::arg("threads"),
             exact("kl"), exact("moments"));
  module.def("kl_gradient", &gradient_of_numpy<T, Element>, exact("p"), exact("q"), py::arg("temperature"),
             py::arg("threads"), exact("moments"), exact("slopes"), exact("dp").none(true), exact("dq").none(true));
}

}  // namespace

void define_kl(py::module_& module) {
  define<float, float>(module);
  define<BFloat16, std::uint16_t>(module);
  define<double, double>(module);
}

}  // namespace twinhead
