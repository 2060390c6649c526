// Generalised advantage estimation: one backward walk per run, the runs shared among threads.
#include "gae.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace twinhead {

namespace {

// An element takes two nanoseconds. Below this many, waiting for a thread on a busy machine costs more than it saves.
constexpr std::int64_t kParallelTokens = 1 << 17;

constexpr double kWhitenEpsilon = 1e-8;  // as in kernels/gae/reference.py

// How many numbers there are, their mean, and the sum of their squared deviations from it.
struct Moments {
  double count = 0, mean = 0, deviations = 0;
};

// The moments of both together (Chan, Golub and LeVeque 1979).
Moments joined(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, share = b.count / std::max(count, 1.0), apart = b.mean - a.mean;
  return {count, a.mean + apart * share, a.deviations + b.deviations + apart * apart * a.count * share};
}

// delta_t = reward_t + gamma value_{t+} - value_t;  advantage_t = delta_t + gamma lam advantage_{t+}.
// Elements that are no action are stepped over: they carry both states on, and come out as 0.
// Returns the moments of the advantages if they are `wanted`. The sums are of distances from the first one that is met,
// because the square of a mean that is far from 0 would drown the variance.
template <typename T>
Moments walk_back(const GaeArrays<T>& arrays, std::int64_t run, T gamma, T decay, bool wanted) {
  T advantage = 0;
  T next_value = arrays.bootstrap ? arrays.bootstrap[run] : T(0);
  double count = 0, origin = 0, sum = 0, squares = 0;
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
    if (!wanted) continue;
    if (count == 0) origin = advantage;
    const double distance = advantage - origin;
    count += 1;
    sum += distance;
    squares += distance * distance;
  }
  if (count == 0) return {};
  const double shift = sum / count;
  return {count, origin + shift, squares - shift * sum};
}

}  // namespace

template <typename T>
void gae(const GaeArrays<T>& arrays, double gamma, double lam, bool whitens, int threads) {
  const std::int64_t total = arrays.rewards.size, runs = arrays.offsets.size - 1;
  const bool parallel = total >= kParallelTokens;
  std::vector<Moments> moments(runs);
#pragma omp parallel for num_threads(threads) schedule(guided) if (parallel)
  for (std::int64_t run = 0; run < runs; ++run) {
    moments[run] = walk_back(arrays, run, static_cast<T>(gamma), static_cast<T>(gamma * lam), whitens);
  }
  if (!whitens) return;
  Moments all;
  for (const Moments& one : moments) all = joined(all, one);
  const double scale = 1 / std::sqrt(all.deviations / std::max(all.count, 1.0) + kWhitenEpsilon);
#pragma omp parallel for num_threads(threads) if (parallel)
  for (std::int64_t t = 0; t < total; ++t) {
    const T whitened = static_cast<T>((arrays.advantages[t] - all.mean) * scale);
    arrays.advantages[t] = arrays.mask && !arrays.mask[t] ? T(0) : whitened;
  }
}

template void gae<float>(const GaeArrays<float>&, double, double, bool, int);
template void gae<double>(const GaeArrays<double>&, double, double, bool, int);

}  // namespace twinhead
