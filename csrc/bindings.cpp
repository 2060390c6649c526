// The Python module twinhead.kernels._C: one line per operation.
#include <pybind11/pybind11.h>

namespace twinhead {

void define_gae(pybind11::module_& module);
void define_kl(pybind11::module_& module);
void define_linear(pybind11::module_& module);
void define_logprob(pybind11::module_& module);
void define_ppo(pybind11::module_& module);
void define_sample(pybind11::module_& module);

}  // namespace twinhead

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ twins of twinhead's kernels for the CPU.";
  twinhead::define_gae(module);
  twinhead::define_kl(module);
  twinhead::define_linear(module);
  twinhead::define_logprob(module);
  twinhead::define_ppo(module);
  twinhead::define_sample(module);
}
