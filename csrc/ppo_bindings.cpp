// ppo_loss for Python: argument checks, and release of the interpreter lock.
#include "numpy.h"
#include "ppo.h"

namespace py = pybind11;

namespace twinhead {
namespace {

template <typename T>
void expect_consistent(const PpoTokens<T>& tokens, const PpoResults<T>& results, double divisor, int threads) {
  const std::int64_t total = tokens.logprobs.size;
  expect_length("ppo_loss", "old_logprobs", total, tokens.old_logprobs.size);
  expect_length("ppo_loss", "advantages", total, tokens.advantages.size);
  expect_length("ppo_loss", "values", total, tokens.values.size);
  expect_length("ppo_loss", "old_values", total, tokens.old_values.size);
  expect_length("ppo_loss", "returns", total, tokens.returns.size);
  if (tokens.mask) expect_length("ppo_loss", "mask", total, tokens.mask.size);
  if (tokens.entropy) expect_length("ppo_loss", "entropy", total, tokens.entropy.size);
  expect_length("ppo_loss", "loss", 1, results.loss.size);
  expect_length("ppo_loss", "statistics", kPpoStatistics, results.statistics.size);
  if (results.slopes) expect_length("ppo_loss", "slopes", (tokens.entropy ? 3 : 2) * total, results.slopes.size);
  expect(divisor >= 0, "ppo_loss: expected divisor >= 0, got " + std::to_string(divisor));
  expect(threads >= 1, "ppo_loss: expected threads >= 1, got " + std::to_string(threads));
}

template <typename T>
void ppo_loss_of_numpy(const Numpy<T>& logprobs, const Numpy<T>& old_logprobs, const Numpy<T>& advantages,
                       const Numpy<T>& values, const Numpy<T>& old_values, const Numpy<T>& returns,
                       const std::optional<Numpy<T>>& entropy, const std::optional<Numpy<bool>>& mask, double clip_low,
                       double clip_high, double dual_clip, double value_clip, double value_coef, double entropy_coef,
                       double divisor, int threads, Numpy<T> loss, Numpy<T> statistics,
                       std::optional<Numpy<T>> slopes) {
  const PpoTokens<T> tokens{readable(logprobs),   readable(old_logprobs), readable(advantages), readable(values),
                            readable(old_values), readable(returns),      readable(entropy),    readable(mask)};
  const PpoSettings settings{clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef, divisor};
  const PpoResults<T> results{writable(loss), writable(statistics), slopes ? writable(*slopes) : Array<T>{nullptr, 0}};
  expect_consistent(tokens, results, divisor, threads);
  const py::gil_scoped_release unlocked;
  ppo_loss(tokens, settings, results, threads);
}

template <typename T>
void define(py::module_& module) {
  module.def("ppo_loss", &ppo_loss_of_numpy<T>, exact("logprobs"), exact("old_logprobs"), exact("advantages"),
             exact("values"), exact("old_values"), exact("returns"), exact("entropy").none(true),
             exact("mask").none(true), py::arg("clip_low"), py::arg("clip_high"), py::arg("dual_clip"),
             py::arg("value_clip"), py::arg("value_coef"), py::arg("entropy_coef"), py::arg("divisor"),
             py::arg("threads"), exact("loss"), exact("statistics"), exact("slopes").none(true));
}

}  // namespace

void define_ppo(py::module_& module) {
  define<float>(module);
  define<double>(module);
}

}  // namespace twinhead
