// The PPO loss: blocks of tokens shared among threads, each summed by itself, the sums added in the blocks' order. So
// the result depends neither on the number of threads nor on which of them was first.
#include "ppo.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace twinhead {

namespace {

constexpr std::int64_t kBlock = 2048;  // tokens: the twelve arrays of a block stay in a core's second cache

// A token takes two nanoseconds. Below this many, waiting for a thread on a busy machine costs more than it saves.
constexpr std::int64_t kParallelTokens = 1 << 17;

constexpr int kLogRatioLimit = 20;  // as in kernels/_surrogate.py

// The settings as the loop wants them, in the precision of the tokens.
template <typename T>
struct Bounds {
  T ratio_low, ratio_high, dual_clip, value_clip;
  T policy_weight, value_weight, entropy_slope;  // of a token's slopes in the gradient
};

template <typename T>
struct Block {
  const T *logprobs, *old_logprobs, *advantages, *values, *old_values, *returns, *entropies;
  const typename Floating<T>::Bits* kept;  // all bits of an action are set, none of the others'
  T *policy_slopes, *value_slopes, *entropy_slopes;
  std::int64_t size;
};

template <typename T>
struct Sums {
  T policy = 0, value = 0, entropy = 0, k1 = 0, k3 = 0, clipped = 0, value_clipped = 0, ratio = 0, ratio_max = 0;
};

template <typename T>
TWINHEAD_INLINE T clamp(T x, T low, T high) {  // NaN stays NaN
  const T bounded = x < low ? low : x;
  return bounded > high ? high : bounded;
}

// x where all bits of `kept` are set, 0 where none is. A condition would do; but where many of them ask the same thing
// gcc makes two loop bodies of one, and vectorises neither.
template <typename T>
TWINHEAD_INLINE T where(typename Floating<T>::Bits kept, T x) {
  return bits_as<T>(bits_as<typename Floating<T>::Bits>(x) & kept);
}

template <typename T>
TWINHEAD_INLINE Sums<T> block_sums(const Block<T>& block, const Bounds<T>& bounds) {
  using Bits = typename Floating<T>::Bits;
  const T *__restrict logprobs = block.logprobs, *__restrict old_logprobs = block.old_logprobs;
  const T *__restrict values = block.values, *__restrict old_values = block.old_values;
  const T *__restrict advantages = block.advantages, *__restrict returns = block.returns;
  const T* __restrict entropies = block.entropies;
  const Bits* __restrict kept = block.kept;
  T *__restrict policy_slopes = block.policy_slopes, *__restrict value_slopes = block.value_slopes;
  T* __restrict entropy_slopes = block.entropy_slopes;
  const T limit = kLogRatioLimit, infinity = std::numeric_limits<T>::infinity();
  T policy = 0, value = 0, entropy = 0, k1 = 0, k3 = 0, clips = 0, value_clips = 0, ratios = 0, ratio_max = 0;
#pragma omp simd reduction(+ : policy, value, entropy, k1, k3, clips, value_clips, ratios) reduction(max : ratio_max)
  for (std::int64_t i = 0; i < block.size; ++i) {
    const Bits action = kept[i];
    const T log_ratio = where(action, logprobs[i] - old_logprobs[i]);
    const T advantage = where(action, advantages[i]);
    const T held = clamp(log_ratio, -limit, limit);
    const T ratio = exp_in_range(held, 0);
    const T free_loss = -advantage * ratio;
    const T clipped_loss = -advantage * clamp(ratio, bounds.ratio_low, bounds.ratio_high);
    const T larger = clipped_loss > free_loss ? clipped_loss : free_loss;
    const T ceiling = advantage < 0 ? -bounds.dual_clip * advantage : infinity;
    const T policy_loss = larger > ceiling ? ceiling : larger;
    // the slope of -A exp(new - old) is that expression itself
    const T slope = held == log_ratio ? policy_loss * bounds.policy_weight : T(0);
    const T unclipped_slope = clipped_loss > free_loss ? T(0) : slope;
    policy_slopes[i] = larger > ceiling ? T(0) : unclipped_slope;

    const T near = clamp(values[i], old_values[i] - bounds.value_clip, old_values[i] + bounds.value_clip);
    const T error = where(action, values[i] - returns[i]), near_error = where(action, near - returns[i]);
    const T square = error * error, near_square = near_error * near_error;
    value_slopes[i] = near_square > square ? T(0) : error * bounds.value_weight;
    entropy_slopes[i] = where(action, bounds.entropy_slope);

    policy += policy_loss;
    value += near_square > square ? near_square : square;
    entropy += where(action, entropies[i]);
    k1 -= log_ratio;
    k3 += ratio - 1 - held;
    clips += clipped_loss > free_loss ? T(1) : T(0);
    value_clips += near_square > square ? T(1) : T(0);
    const T seen = where(action, ratio);
    ratios += seen;
    ratio_max = seen > ratio_max ? seen : ratio_max;
  }
  return {policy, value / 2, entropy, k1, k3, clips, value_clips, ratios, ratio_max};
}

// Clones of a template would have one name; these two have their own.
TWINHEAD_CLONES Sums<float> sums(const Block<float>& block, const Bounds<float>& bounds) {
  return block_sums(block, bounds);
}

TWINHEAD_CLONES Sums<double> sums(const Block<double>& block, const Bounds<double>& bounds) {
  return block_sums(block, bounds);
}

// gcc vectorises loops over bytes, but not over bool.
const std::uint8_t* bytes_of(const Array<const bool>& mask) {
  return reinterpret_cast<const std::uint8_t*>(mask.data);
}

// What a thread keeps for one block: its mask in words, and what stands in for arrays that were not given.
template <typename T>
struct Scratch {
  using Bits = typename Floating<T>::Bits;
  std::array<Bits, kBlock> kept;
  std::array<T, kBlock> entropy{};
  std::array<T, kBlock> slopes;  // nobody reads it

  Scratch() { kept.fill(~Bits(0)); }

  void read(const std::uint8_t* mask, std::int64_t size) {
    for (std::int64_t i = 0; i < size; ++i) kept[i] = Bits(0) - mask[i];
  }
};

template <typename T>
Sums<T> sums_at(std::int64_t start, const PpoTokens<T>& tokens, const Array<T>& slopes, const Bounds<T>& bounds,
                Scratch<T>& scratch) {
  const std::int64_t total = tokens.logprobs.size, size = std::min(kBlock, total - start);
  if (tokens.mask) scratch.read(bytes_of(tokens.mask) + start, size);
  const auto slopes_of = [&](int row, bool wanted) {
    return slopes && wanted ? slopes.data + row * total + start : scratch.slopes.data();
  };
  const Block<T> block{tokens.logprobs.data + start,
                       tokens.old_logprobs.data + start,
                       tokens.advantages.data + start,
                       tokens.values.data + start,
                       tokens.old_values.data + start,
                       tokens.returns.data + start,
                       tokens.entropy ? tokens.entropy.data + start : scratch.entropy.data(),
                       scratch.kept.data(),
                       slopes_of(0, true),
                       slopes_of(1, true),
                       slopes_of(2, static_cast<bool>(tokens.entropy)),
                       size};
  return sums(block, bounds);
}

double divisor_of(const Array<const bool>& mask, std::int64_t total, double given) {
  if (given > 0) return given;
  std::int64_t actions = mask ? 0 : total;
  const std::uint8_t* bytes = bytes_of(mask);
  for (std::int64_t i = 0; i < mask.size; ++i) actions += bytes[i];
  return static_cast<double>(std::max<std::int64_t>(actions, 1));
}

template <typename T>
void write(const std::vector<Sums<T>>& blocks, const PpoSettings& settings, double divisor,
           const PpoResults<T>& results) {
  Sums<double> all;
  for (const Sums<T>& block : blocks) {
    all.policy += block.policy, all.value += block.value, all.entropy += block.entropy;
    all.k1 += block.k1, all.k3 += block.k3, all.ratio += block.ratio;
    all.clipped += block.clipped, all.value_clipped += block.value_clipped;
    all.ratio_max = std::max<double>(all.ratio_max, block.ratio_max);
  }
  const double loss = all.policy + settings.value_coef * all.value - settings.entropy_coef * all.entropy;
  const double ref_kl = 0;  // this loss knows no reference
  const double shares[] = {all.policy, all.value,   all.entropy,       all.k1,   all.k3,
                           ref_kl,     all.clipped, all.value_clipped, all.ratio};
  results.loss[0] = static_cast<T>(loss / divisor);
  T* statistic = results.statistics.data;
  for (const double share : shares) *statistic++ = static_cast<T>(share / divisor);
  *statistic = static_cast<T>(std::isnan(all.ratio) ? all.ratio : all.ratio_max);  // a maximum passes over NaN
}

}  // namespace

template <typename T>
void ppo_loss(const PpoTokens<T>& tokens, const PpoSettings& settings, const PpoResults<T>& results, int threads) {
  const std::int64_t total = tokens.logprobs.size, blocks = (total + kBlock - 1) / kBlock;
  const double divisor = divisor_of(tokens.mask, total, settings.divisor);
  const Bounds<T> bounds{static_cast<T>(1 - settings.clip_low),
                         static_cast<T>(1 + settings.clip_high),
                         static_cast<T>(settings.dual_clip),
                         static_cast<T>(settings.value_clip),
                         static_cast<T>(1 / divisor),
                         static_cast<T>(settings.value_coef / divisor),
                         static_cast<T>(-settings.entropy_coef / divisor)};
  std::vector<Sums<T>> parts(blocks);
  const bool parallel = total >= kParallelTokens;
#pragma omp parallel num_threads(threads) if (parallel)
  {
    Scratch<T> scratch;
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < blocks; ++i) {
      parts[i] = sums_at(i * kBlock, tokens, results.slopes, bounds, scratch);
    }
  }
  write(parts, settings, divisor, results);
}

template void ppo_loss<float>(const PpoTokens<float>&, const PpoSettings&, const PpoResults<float>&, int);
template void ppo_loss<double>(const PpoTokens<double>&, const PpoSettings&, const PpoResults<double>&, int);

}  // namespace twinhead
