// Log-probabilities for Python: argument checks, and release of the interpreter lock.
#include "logprob.h"
#include "numpy.h"

namespace py = pybind11;

namespace twinhead {
namespace {

template <typename T>
using Strided = py::array_t<T, 0>;

template <typename T>
Rows<T> rows_of(const Strided<T>& logits) {
  const py::ssize_t leading = logits.ndim() - 1, item = static_cast<py::ssize_t>(sizeof(T));
  expect(leading >= 0, "logprob: expected logits (..., V), got a number");
  Rows<T> rows{logits.data(), {}, {}, 1, logits.shape(leading)};
  expect(rows.width > 0, "logprob: expected at least one word in logits, got none");
  expect(logits.size() == 0 || rows.width == 1 || logits.strides(leading) == item,
         "logprob: expected the words of a row side by side, got gaps");
  for (py::ssize_t d = 0; d < leading; ++d) {
    expect(logits.strides(d) % item == 0, "logprob: expected strides of whole elements, got others");
    rows.sizes.push_back(logits.shape(d));
    rows.strides.push_back(logits.strides(d) / item);
    rows.count *= logits.shape(d);
  }
  return rows;
}

template <typename T>
Choices<T> choices_of(const Strided<T>& logits, const Numpy<std::int64_t>& index,
                      const std::optional<Numpy<bool>>& mask, double temperature, int threads) {
  expect(index.ndim() >= 1, "logprob: expected index (..., K), got a number");
  const std::int64_t words = index.shape(index.ndim() - 1);
  const Choices<T> choices{rows_of(logits), readable(index), readable(mask), words, temperature};
  const std::int64_t count = choices.logits.count, width = choices.logits.width;
  expect_length("logprob", "index", count * words, choices.index.size);
  if (choices.mask) expect_length("logprob", "row_mask", count, choices.mask.size);
  expect(temperature > 0, "logprob: expected temperature > 0, got " + std::to_string(temperature));
  expect(threads >= 1, "logprob: expected threads >= 1, got " + std::to_string(threads));
  for (std::int64_t i = 0; i < choices.index.size; ++i) {
    if ((!choices.mask || choices.mask[i / words]) && (choices.index[i] < 0 || choices.index[i] >= width)) {
      throw std::invalid_argument("logprob: expected index in [0, " + std::to_string(width) + "), got " +
                                  std::to_string(choices.index[i]));
    }
  }
  return choices;
}

template <typename T>
void logprob_of_numpy(const Strided<T>& logits, const Numpy<std::int64_t>& index,
                      const std::optional<Numpy<bool>>& mask, double temperature, int threads, Numpy<T> logprobs,
                      std::optional<Numpy<T>> entropy, Numpy<T> lse) {
  const Choices<T> choices = choices_of(logits, index, mask, temperature, threads);
  const Likelihood<T> found{writable(logprobs), entropy ? writable(*entropy) : Array<T>{nullptr, 0}, writable(lse)};
  expect_length("logprob", "logprobs", choices.index.size, found.logprobs.size);
  if (found.entropy) expect_length("logprob", "entropy", choices.logits.count, found.entropy.size);
  expect_length("logprob", "lse", 2 * choices.logits.count, found.lse.size);
  const py::gil_scoped_release unlocked;
  logprob(choices, found, threads);
}

template <typename T>
void gradient_of_numpy(const Strided<T>& logits, const Numpy<std::int64_t>& index,
                       const std::optional<Numpy<bool>>& mask, double temperature, int threads, const Numpy<T>& lse,
                       const std::optional<Numpy<T>>& entropy, const Numpy<T>& dlogprobs,
                       const std::optional<Numpy<T>>& dentropy, Numpy<T> dlogits) {
  const Choices<T> choices = choices_of(logits, index, mask, temperature, threads);
  const LikelihoodGradient<T> gradient{readable(lse), readable(entropy), readable(dlogprobs), readable(dentropy)};
  const std::int64_t count = choices.logits.count;
  expect_length("logprob", "lse", 2 * count, gradient.lse.size);
  expect_length("logprob", "dlogprobs", choices.index.size, gradient.dlogprobs.size);
  if (gradient.dentropy) {
    expect_length("logprob", "dentropy", count, gradient.dentropy.size);
    expect_length("logprob", "entropy", count, gradient.entropy.size);
  }
  const Array<T> written = writable(dlogits);
  expect_length("logprob", "dlogits", count * choices.logits.width, written.size);
  const py::gil_scoped_release unlocked;
  logprob_gradient(choices, gradient, written, threads);
}

template <typename T>
void define(py::module_& module) {
  module.def("logprob", &logprob_of_numpy<T>, exact("logits"), exact("index"), exact("row_mask").none(true),
             py::arg("temperature"), py::arg("threads"), exact("logprobs"), exact("entropy").none(true), exact("lse"));
  module.def("logprob_gradient", &gradient_of_numpy<T>, exact("logits"), exact("index"), exact("row_mask").none(true),
             py::arg("temperature"), py::arg("threads"), exact("lse"), exact("entropy").none(true), exact("dlogprobs"),
             exact("dentropy").none(true), exact("dlogits"));
}

}  // namespace

void define_logprob(py::module_& module) {
  define<float>(module);
  define<double>(module);
}

}  // namespace twinhead
