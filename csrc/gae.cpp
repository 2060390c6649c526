// Generalised advantage estimation: one backward walk per run, the runs shared among threads.
#include "gae.h"

namespace twinhead {

namespace {

// An element takes two nanoseconds. Below this many, waiting for a thread on a busy machine costs more than it saves.
constexpr std::int64_t kParallelTokens = 1 << 17;

// delta_t = reward_t + gamma value_{t+} - value_t;  advantage_t = delta_t + gamma lam advantage_{t+}.
// Elements that are no action are stepped over: they carry both states on, and come out as 0.
template <typename T>
void walk_back(const GaeArrays<T>& arrays, std::int64_t run, T gamma, T decay) {
  T advantage = 0;
  T next_value = arrays.bootstrap ? arrays.bootstrap[run] : T(0);
  for (std::int64_t t = arrays.offsets[run + 1] - 1; t >= arrays.offsets[run]; --t) {
    if (arrays.mask && !arrays.mask[t]) {
      arrays.advantages[t] = arrays.returns[t] = 0;
      continue;
    }
    const T value = arrays.values[t];
    const T delta = arrays.rewards[t] + gamma * next_value - value;
    advantage = delta + decay * advantage;
    next_value = value;
    arrays.advantages[t] = advantage;
    arrays.returns[t] = advantage + value;
  }
}

}  // namespace

template <typename T>
void gae(const GaeArrays<T>& arrays, double gamma, double lam, int threads) {
  const std::int64_t runs = arrays.offsets.size - 1;
  const bool parallel = arrays.rewards.size >= kParallelTokens;
#pragma omp parallel for num_threads(threads) schedule(guided) if (parallel)
  for (std::int64_t run = 0; run < runs; ++run) {
    walk_back(arrays, run, static_cast<T>(gamma), static_cast<T>(gamma * lam));
  }
}

template void gae<float>(const GaeArrays<float>&, double, double, int);
template void gae<double>(const GaeArrays<double>&, double, double, int);

}  // namespace twinhead
