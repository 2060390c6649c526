// gae for Python: argument checks, and release of the interpreter lock.
#include "gae.h"
#include "numpy.h"

namespace py = pybind11;

namespace twinhead {
namespace {

template <typename T>
void expect_consistent(const GaeArrays<T>& arrays, int threads) {
  const std::int64_t total = arrays.rewards.size, runs = arrays.offsets.size - 1;
  expect_length("gae", "values", total, arrays.values.size);
  expect_length("gae", "advantages", total, arrays.advantages.size);
  expect_length("gae", "returns", total, arrays.returns.size);
  if (arrays.mask) expect_length("gae", "mask", total, arrays.mask.size);
  expect(runs >= 0, "gae: expected offsets of length S + 1, got none");
  if (arrays.bootstrap) expect_length("gae", "bootstrap", runs, arrays.bootstrap.size);
  bool rising = arrays.offsets[0] == 0 && arrays.offsets[runs] == total;
  for (std::int64_t run = 0; run < runs && rising; ++run) rising = arrays.offsets[run] <= arrays.offsets[run + 1];
  expect(rising, "gae: expected offsets to rise from 0 to " + std::to_string(total) + ", got others");
  expect(threads >= 1, "gae: expected threads >= 1, got " + std::to_string(threads));
}

template <typename T>
void gae_of_numpy(const Numpy<T>& rewards, const Numpy<T>& values, const Numpy<std::int64_t>& offsets,
                  const std::optional<Numpy<bool>>& mask, const std::optional<Numpy<T>>& bootstrap, double gamma,
                  double lam, bool whitens, int threads, Numpy<T> advantages, Numpy<T> returns) {
  const GaeArrays<T> arrays{readable(rewards),   readable(values),     readable(offsets), readable(mask),
                            readable(bootstrap), writable(advantages), writable(returns)};
  expect_consistent(arrays, threads);
  const py::gil_scoped_release unlocked;
  gae(arrays, gamma, lam, whitens, threads);
}

template <typename T>
void define(py::module_& module) {
  module.def("gae", &gae_of_numpy<T>, exact("rewards"), exact("values"), exact("offsets"), exact("mask").none(true),
             exact("bootstrap").none(true), py::arg("gamma"), py::arg("lam"), py::arg("whitens"), py::arg("threads"),
             exact("advantages"), exact("returns"));
}

}  // namespace

void define_gae(py::module_& module) {
  define<float>(module);
  define<double>(module);
}

}  // namespace twinhead
