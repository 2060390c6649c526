// Log-probabilities and entropies, forward and backward, in one pass over each row; the rows are shared among threads.
#include "logprob.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "pages.h"
#include "simd.h"

namespace twinhead {

namespace {

// Words whose exponentials are summed in T before the sum goes on in double. Longer blocks are no faster.
constexpr std::int64_t kBlock = 512;

// How many bytes ahead a row is fetched, so that memory works while the exponentials are computed. Without this a pass
// takes a fifth longer.
constexpr std::int64_t kAhead = 1 << 14;
constexpr std::int64_t kCacheLine = 64;

// How far above the origin, in powers of two, a block may rise before the origin moves.
constexpr int kRise = 4;

// With e = exp((z - origin) / temperature): the sums of e and of e (z - origin), the second only where it is asked for.
template <typename T>
struct Mass {
  double total, moment;
  T largest;  // z
};

template <typename T>
TWINHEAD_INLINE T largest_of(const T* __restrict z, std::int64_t size) {
  T largest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = 0; i < size; ++i) largest = z[i] > largest ? z[i] : largest;
  return largest;
}

// The bytes may lie beyond the row, in the next one or nowhere: asking for them is not reading them.
TWINHEAD_INLINE void fetch(const void* data, std::int64_t bytes) {
#if defined(__GNUC__)
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data);
  for (std::int64_t i = 0; i < bytes; i += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + kAhead + i));
  }
#else
  (void)data, (void)bytes;
#endif
}

// rate is log2(e) / temperature. For an entropy all e are less by the e of the lowest distance: that makes exactly 0 of
// the words which lie below it, and leaves no trace in the others.
template <bool with_entropy, typename T>
TWINHEAD_INLINE Mass<T> mass_of(const T* __restrict z, std::int64_t size, T origin, T rate) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const T lowest = Floating<T>::kLowestPower / rate;
  const T least = with_entropy ? exp2_of_product(lowest, rate) : T(0);
  const T start = origin > -kInfinity ? origin : T(0);  // nothing but excluded words until now
  T total = 0, moment = 0, largest = -kInfinity;
#pragma omp simd reduction(max : largest) reduction(+ : total, moment)
  for (std::int64_t i = 0; i < size; ++i) {
    const T distance = z[i] - start;
    const T bounded = distance < lowest ? lowest : distance;
    const T e = exp2_of_product(bounded, rate) - least;
    total += e;
    if (with_entropy) moment += e * bounded;
    largest = z[i] > largest ? z[i] : largest;
  }
  return {total, moment, largest};
}

template <typename T>
struct RowMass {
  T origin;
  double total, moment;

  void move_to(T higher, double temperature) {
    const double fall = std::max(static_cast<double>(origin) - higher, -1e4 * temperature);  // e^-10000 is 0
    const double fade = std::exp(fall / temperature);
    moment = (moment + total * fall) * fade;
    total *= fade;
    origin = higher;
  }
};

// A row is read once: its origin is the largest logit of its first block, and where a later block rises far above that,
// the origin moves there and the block, which is still in the first cache, is summed again.
template <bool with_entropy, typename T>
TWINHEAD_CLONES RowMass<T> row_mass(const T* __restrict z, std::int64_t width, double temperature) {
  const T rate = static_cast<T>(Floating<double>::kLog2E / temperature);
  RowMass<T> row{largest_of(z, std::min(kBlock, width)), 0, 0};
  for (std::int64_t first = 0; first < width; first += kBlock) {
    const std::int64_t size = std::min(kBlock, width - first);
    fetch(z + first, size * static_cast<std::int64_t>(sizeof(T)));
    Mass<T> block = mass_of<with_entropy>(z + first, size, row.origin, rate);
    if ((block.largest - row.origin) * rate > kRise) {
      row.move_to(block.largest, temperature);
      block = mass_of<with_entropy>(z + first, size, row.origin, rate);
    }
    row.total += block.total;
    row.moment += block.moment;
  }
  return row;
}

// p (level + slope log p), where log p = (z - origin) scale - log_sum.
template <typename T>
TWINHEAD_CLONES void weigh(const T* __restrict z, std::int64_t width, T origin, T scale, T log_sum, T level, T slope,
                           T* __restrict out) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) {
    const T logp = (z[i] - origin) * scale - log_sum;
    const T bounded = logp < Floating<T>::kLowest ? Floating<T>::kLowest : logp;
    out[i] = exp_in_range(bounded, 0) * (level + slope * bounded);
  }
}

template <typename T>
void find_row(const Choices<T>& choices, const Likelihood<T>& found, std::int64_t row) {
  T* const logprobs = found.logprobs.data + row * choices.words;
  T* const lse = found.lse.data + 2 * row;
  if (choices.mask && !choices.mask[row]) {
    std::fill_n(logprobs, choices.words, T(0));
    std::fill_n(lse, 2, T(0));
    if (found.entropy) found.entropy[row] = 0;
    return;
  }
  const T* const z = choices.logits[row];
  const std::int64_t* const index = choices.index.data + row * choices.words;
  const auto row_mass_of = found.entropy ? row_mass<true, T> : row_mass<false, T>;
  const RowMass<T> mass = row_mass_of(z, choices.logits.width, choices.temperature);
  const double log_sum = std::log(mass.total);
  for (std::int64_t k = 0; k < choices.words; ++k) {
    const double distance = static_cast<double>(z[index[k]]) - mass.origin;
    logprobs[k] = static_cast<T>(distance / choices.temperature - log_sum);
  }
  if (found.entropy) found.entropy[row] = static_cast<T>(log_sum - mass.moment / mass.total / choices.temperature);
  lse[0] = mass.origin;
  lse[1] = static_cast<T>(log_sum);
}

// d logprob_k / du_v = [v = k] - p_v,   d entropy / du_v = -p_v (log p_v + entropy)
template <typename T>
void descend_row(const Choices<T>& choices, const LikelihoodGradient<T>& gradient, T* dlogits, std::int64_t row) {
  const std::int64_t width = choices.logits.width;
  if (choices.mask && !choices.mask[row]) {
    std::fill_n(dlogits, width, T(0));
    return;
  }
  const T* const dlogprobs = gradient.dlogprobs.data + row * choices.words;
  const std::int64_t* const index = choices.index.data + row * choices.words;
  const double dentropy = gradient.dentropy ? gradient.dentropy[row] : T(0);
  double level = gradient.dentropy ? dentropy * gradient.entropy[row] : 0;
  for (std::int64_t k = 0; k < choices.words; ++k) level += dlogprobs[k];
  const double scale = 1 / choices.temperature;
  weigh(choices.logits[row], width, gradient.lse[2 * row], static_cast<T>(scale), gradient.lse[2 * row + 1],
        static_cast<T>(-level * scale), static_cast<T>(-dentropy * scale), dlogits);
  for (std::int64_t k = 0; k < choices.words; ++k) dlogits[index[k]] += static_cast<T>(dlogprobs[k] * scale);
}

}  // namespace

template <typename T>
void logprob(const Choices<T>& choices, const Likelihood<T>& found, int threads) {
  const std::int64_t rows = choices.logits.count;
  const bool parallel = rows * choices.logits.width >= kParallelElements;
#pragma omp parallel for num_threads(threads) schedule(guided) if (parallel)
  for (std::int64_t row = 0; row < rows; ++row) find_row(choices, found, row);
}

template <typename T>
void logprob_gradient(const Choices<T>& choices, const LikelihoodGradient<T>& gradient, Array<T> dlogits, int threads) {
  const std::int64_t rows = choices.logits.count, width = choices.logits.width;
  const bool parallel = rows * width >= kParallelElements;
  prefer_large_pages(dlogits.data, dlogits.size * static_cast<std::int64_t>(sizeof(T)));
#pragma omp parallel for num_threads(threads) schedule(guided) if (parallel)
  for (std::int64_t row = 0; row < rows; ++row) descend_row(choices, gradient, dlogits.data + row * width, row);
}

template void logprob<float>(const Choices<float>&, const Likelihood<float>&, int);
template void logprob<double>(const Choices<double>&, const Likelihood<double>&, int);
template void logprob_gradient<float>(const Choices<float>&, const LikelihoodGradient<float>&, Array<float>, int);
template void logprob_gradient<double>(const Choices<double>&, const LikelihoodGradient<double>&, Array<double>, int);

}  // namespace twinhead
