// sample for Python: argument checks, and release of the interpreter lock.
#include "numpy.h"
#include "sample.h"

namespace py = pybind11;

namespace twinhead {
namespace {

// T is what the logits are; Element is how numpy, which has no bfloat16, stores one.
template <typename T, typename Element>
void sample_of_numpy(const py::array_t<Element, 0>& logits, const Numpy<typename SampleArrays<T>::Real>& uniforms,
                     double temperature, std::int64_t top_k, double top_p, double min_p, int threads,
                     Numpy<std::int64_t> tokens, Numpy<typename SampleArrays<T>::Real> logprobs) {
  static_assert(sizeof(T) == sizeof(Element), "an element must be the number's bits");
  constexpr std::int64_t kWidth = sizeof(T);
  expect(logits.ndim() == 2 && logits.shape(1) > 0, "sample: expected logits of shape (B, V), V > 0, got another");
  const std::int64_t rows = logits.shape(0), words = logits.shape(1);
  const bool without_gaps = rows == 0 || words == 1 || logits.strides(1) == kWidth;
  expect(without_gaps, "sample: expected rows without gaps, got a stride between words");
  expect(logits.strides(0) % kWidth == 0, "sample: expected rows a whole number of elements apart, got others");
  expect_length("sample", "uniforms", rows, uniforms.size());
  expect_length("sample", "tokens", rows, tokens.size());
  expect_length("sample", "logprobs", rows, logprobs.size());
  expect(threads >= 1, "sample: expected threads >= 1, got " + std::to_string(threads));
  const SampleArrays<T> arrays{reinterpret_cast<const T*>(logits.data()),
                               rows,
                               words,
                               logits.strides(0) / kWidth,
                               readable(uniforms),
                               writable(tokens),
                               writable(logprobs)};
  const py::gil_scoped_release unlocked;
  sample(arrays, {temperature, top_k, top_p, min_p}, threads);
}

template <typename T, typename Element>
void define(py::module_& module) {
  module.def("sample", &sample_of_numpy<T, Element>, exact("logits"), exact("uniforms"), py::arg("temperature"),
             py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("threads"), exact("tokens"),
             exact("logprobs"));
}

}  // namespace

void define_sample(py::module_& module) {
  define<float, float>(module);
  define<BFloat16, std::uint16_t>(module);
  define<double, double>(module);
}

}  // namespace twinhead
