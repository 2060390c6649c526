// The end of a head for Python: argument checks, and release of the interpreter lock.
#include "linear.h"
#include "numpy.h"

namespace py = pybind11;

namespace twinhead {
namespace {

template <typename T>
HeadBlock<T> block_of(Numpy<T>& products, const std::optional<Numpy<T>>& bias, const Numpy<std::int64_t>& targets,
                      const LogitShape& shape, int threads) {
  expect(products.ndim() == 2, "linear: expected products (n, V), got " + std::to_string(products.ndim()) +
                                   " dimensions");
  const std::int64_t words = products.shape(1);
  expect_length("linear", "targets", products.shape(0), targets.size());
  if (bias) expect_length("linear", "bias", words, bias->size());
  for (std::int64_t r = 0; r < targets.size(); ++r) {
    const std::int64_t target = targets.data()[r];
    expect(target < words, "linear: expected targets below " + std::to_string(words) + ", got " +
                               std::to_string(target));
  }
  expect(threads >= 1, "linear: expected threads >= 1, got " + std::to_string(threads));
  return {writable(products), readable(bias), readable(targets), shape};
}

template <typename T>
Measures<T> measures_of(Numpy<T>& entropy, Numpy<T>& peak, Numpy<T>& log_sum, std::int64_t rows) {
  expect_length("linear", "entropy", rows, entropy.size());
  expect_length("linear", "peak", rows, peak.size());
  expect_length("linear", "log_sum", rows, log_sum.size());
  return {writable(entropy), writable(peak), writable(log_sum)};
}

template <typename T>
void measure_of_numpy(Numpy<T> products, const std::optional<Numpy<T>>& bias, const Numpy<std::int64_t>& targets,
                      double scale, double softcap, double temperature, Numpy<T> logprobs, Numpy<T> entropy,
                      Numpy<T> peak, Numpy<T> log_sum, int threads) {
  const HeadBlock<T> block = block_of(products, bias, targets, {scale, softcap, temperature}, threads);
  const Measures<T> measures = measures_of(entropy, peak, log_sum, block.rows());
  expect_length("linear", "logprobs", block.rows(), logprobs.size());
  const Array<T> written = writable(logprobs);
  const py::gil_scoped_release unlocked;
  measure_head(block, written, measures, threads);
}

template <typename T>
void gradient_of_numpy(Numpy<T> products, const std::optional<Numpy<T>>& bias, const Numpy<std::int64_t>& targets,
                       double scale, double softcap, double temperature, Numpy<T> entropy, Numpy<T> peak,
                       Numpy<T> log_sum, const std::optional<Numpy<T>>& slopes,
                       const std::optional<Numpy<T>>& entropy_slopes, int threads) {
  const HeadBlock<T> block = block_of(products, bias, targets, {scale, softcap, temperature}, threads);
  const Measures<T> measures = measures_of(entropy, peak, log_sum, block.rows());
  if (slopes) expect_length("linear", "slopes", block.rows(), slopes->size());
  if (entropy_slopes) expect_length("linear", "entropy_slopes", block.rows(), entropy_slopes->size());
  const py::gil_scoped_release unlocked;
  head_gradient(block, measures, readable(slopes), readable(entropy_slopes), threads);
}

template <typename T>
void learn_of_numpy(Numpy<T> products, const std::optional<Numpy<T>>& bias, const Numpy<std::int64_t>& targets,
                    double scale, double softcap, double temperature, Numpy<T> logprobs, Numpy<T> entropy,
                    Numpy<T> peak, Numpy<T> log_sum, const Numpy<T>& old_logprobs, const Numpy<T>& advantages,
                    const std::optional<Numpy<T>>& ref_logprobs, double clip_low, double clip_high, double dual_clip,
                    double kl_coef, int kl_estimator, double entropy_coef, double divisor, int threads) {
  const HeadBlock<T> block = block_of(products, bias, targets, {scale, softcap, temperature}, threads);
  const Measures<T> measures = measures_of(entropy, peak, log_sum, block.rows());
  expect_length("linear", "logprobs", block.rows(), logprobs.size());
  expect_length("linear", "old_logprobs", block.rows(), old_logprobs.size());
  expect_length("linear", "advantages", block.rows(), advantages.size());
  if (ref_logprobs) expect_length("linear", "ref_logprobs", block.rows(), ref_logprobs->size());
  const TokenObjective<T> objective{readable(old_logprobs), readable(advantages), readable(ref_logprobs), clip_low,
                                    clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef, divisor};
  const Array<T> written = writable(logprobs);
  const py::gil_scoped_release unlocked;
  learn_head(block, written, measures, objective, threads);
}

template <typename T>
void define(py::module_& module) {
  module.def("linear_measure", &measure_of_numpy<T>, exact("products"), exact("bias").none(true), exact("targets"),
             py::arg("scale"), py::arg("softcap"), py::arg("temperature"), exact("logprobs"), exact("entropy"),
             exact("peak"), exact("log_sum"), py::arg("threads"));
  module.def("linear_gradient", &gradient_of_numpy<T>, exact("products"), exact("bias").none(true), exact("targets"),
             py::arg("scale"), py::arg("softcap"), py::arg("temperature"), exact("entropy"), exact("peak"),
             exact("log_sum"), exact("slopes").none(true), exact("entropy_slopes").none(true), py::arg("threads"));
  module.def("linear_learn", &learn_of_numpy<T>, exact("products"), exact("bias").none(true), exact("targets"),
             py::arg("scale"), py::arg("softcap"), py::arg("temperature"), exact("logprobs"), exact("entropy"),
             exact("peak"), exact("log_sum"), exact("old_logprobs"), exact("advantages"),
             exact("ref_logprobs").none(true), py::arg("clip_low"), py::arg("clip_high"), py::arg("dual_clip"),
             py::arg("kl_coef"), py::arg("kl_estimator"), py::arg("entropy_coef"), py::arg("divisor"),
             py::arg("threads"));
}

}  // namespace

void define_linear(py::module_& module) {
  define<float>(module);
  define<double>(module);
}

}  // namespace twinhead
