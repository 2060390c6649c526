// Inverse-transform sampling. Without a filter one pass over the row sums the weights block by block, relative to the
// largest logit so far, and a second touch of one block finds the word. The filters keep what lies above a threshold,
// which is searched by halving an interval of logits; only the words within the interval are looked at again.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace twinhead {

namespace {

constexpr std::int64_t kBlock = 512;  // words whose weights are summed in the precision of the logits
constexpr std::int64_t kLine = 32;    // words that are stepped over together on the way to the drawn one
constexpr int kHalvings = 10;         // of an interval, before the words within it are gathered,
constexpr std::int64_t kFew = 128;    // or as soon as one in so many is left

template <typename Real>
struct Block {
  Real sum;   // of the words' weights
  Real peak;  // the largest logit up to here
};

template <typename Real>
struct Words {
  const Real* logits;
  const Real* weights;
  std::int64_t size;
};

// Words that were picked out of others, in the same order, and the places where they stood.
template <typename Real>
struct Gathered {
  std::vector<Real> logits, weights;
  std::vector<std::int64_t> places;

  Words<Real> words() const {
    return {logits.data(), weights.data(), static_cast<std::int64_t>(logits.size())};
  }
};

// The memory of one thread, kept from call to call.
template <typename Real>
struct Scratch {
  std::vector<Block<Real>> blocks;
  std::vector<double> cumulative;  // over blocks
  std::vector<Real> logits, weights;
  std::vector<std::uint8_t> inside;
  std::vector<std::int64_t> found;
  Gathered<Real> ranked, near, nearer;
};

// The vector's memory, which only ever grows.
template <typename T>
T* at_least(std::vector<T>& vector, std::int64_t size) {
  if (static_cast<std::int64_t>(vector.size()) < size) vector.resize(size);
  return vector.data();
}

// What a filter keeps: every word at or above `lowest` up to the place `last`, and at or above `higher` after it.
template <typename Real>
struct Kept {
  Real lowest, higher;
  std::int64_t last;
};

struct Measure {
  double mass;
  std::int64_t count;
};

template <typename T>
struct Drawn {
  std::int64_t token;
  T logprob;
};

// Calls f(begin, length) for every block. A length that the compiler knows keeps the sums of a loop in registers.
template <typename F>
TWINHEAD_INLINE void for_blocks(std::int64_t size, F f) {
  std::int64_t begin = 0;
  for (; begin + kBlock <= size; begin += kBlock) f(begin, kBlock);
  if (begin < size) f(begin, size - begin);
}

// At least the lowest finite number. NaN is passed over here; it shows in the sums.
template <typename Real>
TWINHEAD_INLINE Real largest(const Real* __restrict x, std::int64_t size, Real peak) {
#pragma omp simd reduction(max : peak)
  for (std::int64_t i = 0; i < size; ++i) {
    const Real here = x[i];
    peak = here > peak ? here : peak;
  }
  return peak;
}

template <typename Real>
TWINHEAD_INLINE Real sum_of_weights(const Real* __restrict x, std::int64_t size, Real peak, Real scale) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < size; ++i) sum += exp_nonpositive((x[i] - peak) * scale);
  return sum;
}

template <typename Real>
TWINHEAD_INLINE Real write_weights(const Real* __restrict x, std::int64_t size, Real peak, Real scale,
                                   Real* __restrict weights) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < size; ++i) {
    const Real weight = exp_nonpositive((x[i] - peak) * scale);
    weights[i] = weight;
    sum += weight;
  }
  return sum;
}

template <typename Real>
TWINHEAD_INLINE void add_measure(const Real* __restrict x, const Real* __restrict weights, std::int64_t size,
                                 Real lowest, Measure& total) {
  Real mass = 0;
  std::int32_t count = 0;
#pragma omp simd reduction(+ : mass, count)
  for (std::int64_t i = 0; i < size; ++i) {
    const Real weight = weights[i];
    const bool inside = x[i] >= lowest;
    mass += inside ? weight : Real(0);
    count += inside ? 1 : 0;
  }
  total.mass += mass;
  total.count += count;
}

template <typename Real>
TWINHEAD_CLONES Real largest_of_row(const Real* __restrict x, std::int64_t size) {
  Real peak = std::numeric_limits<Real>::lowest();
  for_blocks(size, [&](std::int64_t begin, std::int64_t length) { peak = largest(x + begin, length, peak); });
  return peak;
}

// The sums are relative to the peak of the last block, which is that of the row.
template <typename Real>
TWINHEAD_CLONES void sum_blocks(const Real* __restrict x, std::int64_t size, Real scale, Block<Real>* blocks) {
  Real peak = std::numeric_limits<Real>::lowest();
  Block<Real>* block = blocks;
  for_blocks(size, [&](std::int64_t begin, std::int64_t length) {
    peak = largest(x + begin, length, peak);
    *block++ = {sum_of_weights(x + begin, length, peak, scale), peak};
  });
  while (block-- != blocks) block->sum *= exp_nonpositive((block->peak - peak) * scale);
}

template <typename Real>
TWINHEAD_CLONES double weigh(const Real* __restrict x, std::int64_t size, Real peak, Real scale,
                             Real* __restrict weights) {
  double total = 0;
  for_blocks(size, [&](std::int64_t begin, std::int64_t length) {
    total += write_weights(x + begin, length, peak, scale, weights + begin);
  });
  return total;
}

// Of the words at or above `lowest`.
template <typename Real>
TWINHEAD_CLONES Measure measure(const Real* __restrict x, const Real* __restrict weights, std::int64_t size,
                                Real lowest) {
  Measure total{0, 0};
  for_blocks(size, [&](std::int64_t begin, std::int64_t length) {
    add_measure(x + begin, weights + begin, length, lowest, total);
  });
  return total;
}

// Writes the places of the words with lowest <= x < ceiling and returns their number; inside: a byte for each word.
template <typename Real>
TWINHEAD_CLONES std::int64_t find_between(const Real* __restrict x, std::int64_t size, Real lowest, Real ceiling,
                                          std::uint8_t* __restrict inside, std::int64_t* __restrict found) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) inside[i] = (x[i] >= lowest) & (x[i] < ceiling);
  std::int64_t count = 0;
  constexpr std::int64_t kTogether = sizeof(std::uint64_t);
  for (std::int64_t begin = 0; begin < size; begin += kTogether) {
    const std::int64_t length = size - begin < kTogether ? size - begin : kTogether;
    std::uint64_t any = 0;
    std::memcpy(&any, inside + begin, length);
    if (!any) continue;
    for (std::int64_t i = begin; i < begin + length; ++i) {
      found[count] = i;
      count += inside[i];
    }
  }
  return count;
}

template <typename Real>
void gather(const Words<Real>& words, Real lowest, Real ceiling, Scratch<Real>& scratch, Gathered<Real>& to) {
  std::int64_t* found = at_least(scratch.found, words.size);
  const std::int64_t count =
      find_between(words.logits, words.size, lowest, ceiling, at_least(scratch.inside, words.size), found);
  to.logits.resize(count);
  to.weights.resize(count);
  to.places.resize(count);
  for (std::int64_t i = 0; i < count; ++i) {
    to.logits[i] = words.logits[found[i]];
    to.weights[i] = words.weights[found[i]];
    to.places[i] = found[i];
  }
}

// An interval of logits, lowest <= x < ceiling, in which the last word lies whose mass or rank a filter still keeps.
template <typename Real>
struct Interval {
  Real lowest, ceiling;
  Real top;      // a finite number that nothing below the ceiling exceeds
  Real step;     // how far below the top the next guess lies, as long as there is no lowest
  double above;  // the measure of everything from the ceiling upwards

  // Above the lowest, and below the ceiling unless no number is left between the two.
  Real pivot() {
    if (lowest == -std::numeric_limits<Real>::infinity()) {
      const Real guess = top - step;
      step *= 4;
      return guess;
    }
    const Real middle = lowest / 2 + top / 2;
    return middle > lowest ? middle : top;
  }
};

// Which of the filters' two questions: the words that hold a mass, or so many words?
enum class Unit { kMass, kCount };

// Halves the interval until few of the words are left in it; `base` is the measure of what ranks above all of them.
template <typename Real>
void halve(const Words<Real>& words, Unit unit, double wanted, double base, Interval<Real>& interval) {
  std::int64_t from_lowest = words.size, from_ceiling = 0;
  for (int i = 0; i < kHalvings && (from_lowest - from_ceiling) * kFew > words.size; ++i) {
    const Real pivot = interval.pivot();
    if (pivot >= interval.ceiling) return;
    const Measure part = measure(words.logits, words.weights, words.size, pivot);
    const double reached = base + (unit == Unit::kMass ? part.mass : static_cast<double>(part.count));
    if (reached >= wanted) {
      interval.lowest = pivot;
      from_lowest = part.count;
    } else {
      interval.ceiling = interval.top = pivot;
      interval.above = reached;
      from_ceiling = part.count;
    }
  }
}

// The shortest prefix, in falling order of the logits and rising order of the places, that reaches what is wanted.
template <typename Real>
Kept<Real> reach(const Words<Real>& words, Real peak, Real step, Unit unit, double wanted, Scratch<Real>& scratch) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  Interval<Real> interval{-kInfinity, kInfinity, peak, step, 0};
  halve(words, unit, wanted, 0, interval);
  const Real lowest_finite = std::numeric_limits<Real>::lowest();
  gather(words, std::max(interval.lowest, lowest_finite), interval.ceiling, scratch, scratch.near);
  Gathered<Real>&near = scratch.near, &nearer = scratch.nearer;
  while (true) {
    if (near.logits.empty()) return {-kInfinity, -kInfinity, 0};  // a rounding error short of everything
    const auto [low, high] = std::minmax_element(near.logits.begin(), near.logits.end());
    if (*low == *high) break;
    interval.lowest = *low;
    interval.ceiling = kInfinity;
    interval.top = *high;
    halve(near.words(), unit, wanted, interval.above, interval);
    gather(near.words(), interval.lowest, interval.ceiling, scratch, nearer);
    for (std::int64_t& place : nearer.places) place = near.places[place];
    std::swap(near, nearer);
  }
  const Real threshold = near.logits[0], weight = near.weights[0];
  const double missing = wanted - interval.above;
  const double ties = unit == Unit::kCount ? missing : weight > 0 ? std::ceil(missing / weight) : kInfinity;
  const std::int64_t size = near.places.size();
  const std::int64_t count = ties < size ? std::max<std::int64_t>(1, static_cast<std::int64_t>(ties)) : size;
  return {threshold, std::nextafter(threshold, kInfinity), near.places[count - 1]};
}

// Keeps the k likeliest words in `scratch.ranked`; where the last of them has equals, those that come first.
template <typename Real>
void rank(const Words<Real>& words, Real peak, Real step, std::int64_t k, Scratch<Real>& scratch) {
  const Kept<Real> kept = reach(words, peak, step, Unit::kCount, static_cast<double>(k), scratch);
  Gathered<Real>& ranked = scratch.ranked;
  gather(words, kept.lowest, std::numeric_limits<Real>::infinity(), scratch, ranked);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(ranked.places.size()); ++i) {
    ranked.logits[count] = ranked.logits[i];
    ranked.weights[count] = ranked.weights[i];
    ranked.places[count] = ranked.places[i];
    count += ranked.places[i] <= kept.last || ranked.logits[i] >= kept.higher;
  }
  ranked.logits.resize(count);
  ranked.weights.resize(count);
  ranked.places.resize(count);
}

// The first block whose cumulative mass exceeds u * total.
std::int64_t block_of(const std::vector<double>& cumulative, double u) {
  const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), u * cumulative.back());
  return std::min(found, cumulative.end() - 1) - cumulative.begin();
}

// The first place whose cumulative weight exceeds `wanted`; where rounding falls short of it, the last with a weight.
template <typename Real>
std::int64_t place_of(const Real* weights, std::int64_t size, double wanted) {
  double cumulative = 0;
  std::int64_t begin = 0;
  for (; begin + kLine < size; begin += kLine) {
    double line = 0;
#pragma omp simd reduction(+ : line)
    for (std::int64_t i = begin; i < begin + kLine; ++i) line += weights[i];
    if (cumulative + line > wanted) break;
    cumulative += line;
  }
  for (std::int64_t i = begin; i < size; ++i) {
    cumulative += weights[i];
    if (cumulative > wanted) return i;
  }
  std::int64_t last = size - 1;
  while (last > 0 && !(weights[last] > 0)) --last;
  return last;
}

template <typename Real>
Drawn<Real> draw(const Real* x, std::int64_t size, Real scale, double u, Scratch<Real>& scratch) {
  const std::int64_t count = (size + kBlock - 1) / kBlock;
  scratch.blocks.resize(count);
  scratch.cumulative.resize(count);
  sum_blocks(x, size, scale, scratch.blocks.data());
  const Real peak = scratch.blocks.back().peak;
  double total = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    total += scratch.blocks[i].sum;
    scratch.cumulative[i] = total;
  }
  if (!(total > 0)) return {size - 1, std::numeric_limits<Real>::quiet_NaN()};
  const std::int64_t chosen = block_of(scratch.cumulative, u), begin = chosen * kBlock;
  const double before = chosen > 0 ? scratch.cumulative[chosen - 1] : 0;
  Real weights[kBlock];
  const std::int64_t length = std::min(kBlock, size - begin);
  weigh(x + begin, length, peak, scale, weights);
  const std::int64_t token = begin + place_of(weights, length, u * total - before);
  return {token, (x[token] - peak) * scale - Real(std::log(total))};
}

// The likeliest word; of several the first.
template <typename Real>
Drawn<Real> draw_greedily(const Real* x, std::int64_t size, Scratch<Real>& scratch) {
  const Drawn<Real> any = draw(x, size, Real(1), 0, scratch);
  if (std::isnan(any.logprob)) return any;
  const Real peak = scratch.blocks.back().peak;
  std::int64_t token = 0;
  while (scratch.blocks[token / kBlock].peak < peak) token += kBlock;
  while (x[token] != peak) ++token;
  return {token, -Real(std::log(scratch.cumulative.back()))};
}

// From what is kept of the words; the token is a place among them.
template <typename Real>
Drawn<Real> draw_kept(const Words<Real>& words, const Kept<Real>& kept, Real peak, Real scale, double u,
                      Scratch<Real>& scratch) {
  std::vector<double>& cumulative = scratch.cumulative;
  const auto mass = [&](std::int64_t begin, std::int64_t end, Real lowest) {
    return begin < end ? measure(words.logits + begin, words.weights + begin, end - begin, lowest).mass : 0;
  };
  cumulative.clear();
  double total = 0;
  for (std::int64_t begin = 0; begin < words.size; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, words.size), turn = std::clamp(kept.last + 1, begin, end);
    total += mass(begin, turn, kept.lowest) + mass(turn, end, kept.higher);
    cumulative.push_back(total);
  }
  const std::int64_t chosen = block_of(cumulative, u), begin = chosen * kBlock;
  const double before = chosen > 0 ? cumulative[chosen - 1] : 0;
  Real weights[kBlock];
  const std::int64_t length = std::min(kBlock, words.size - begin);
  for (std::int64_t i = 0; i < length; ++i) {
    const Real lowest = begin + i <= kept.last ? kept.lowest : kept.higher;
    weights[i] = words.logits[begin + i] >= lowest ? words.weights[begin + i] : Real(0);
  }
  const std::int64_t place = begin + place_of(weights, length, u * total - before);
  return {place, (words.logits[place] - peak) * scale - Real(std::log(total))};
}

// top-p of the words, and min-p of what that keeps.
template <typename Real>
Drawn<Real> draw_nucleus(const Words<Real>& words, double total, const Filters& filters, Real peak, Real scale,
                         double u, Scratch<Real>& scratch) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  Kept<Real> kept{-kInfinity, -kInfinity, 0};
  if (filters.top_p < 1) kept = reach(words, peak, 4 / scale, Unit::kMass, filters.top_p * total, scratch);
  const Real likely = static_cast<Real>(peak + std::log(filters.min_p) * filters.temperature);
  if (likely > kept.lowest) kept = {likely, likely, 0};
  return draw_kept(words, kept, peak, scale, u, scratch);
}

template <typename Real>
Drawn<Real> draw_filtered(const Real* x, std::int64_t size, const Filters& filters, Real scale, double u,
                          Scratch<Real>& scratch) {
  Real* weights = at_least(scratch.weights, size);
  const Real peak = largest_of_row(x, size);
  double total = weigh(x, size, peak, scale, weights);
  if (!(total > 0)) return {size - 1, std::numeric_limits<Real>::quiet_NaN()};
  const Words<Real> row{x, weights, size};
  if (filters.top_k == 0 || filters.top_k >= size) return draw_nucleus(row, total, filters, peak, scale, u, scratch);
  rank(row, peak, 4 / scale, filters.top_k, scratch);
  const Words<Real> ranked = scratch.ranked.words();
  total = measure(ranked.logits, ranked.weights, ranked.size, std::numeric_limits<Real>::lowest()).mass;
  Drawn<Real> drawn = draw_nucleus(ranked, total, filters, peak, scale, u, scratch);
  drawn.token = scratch.ranked.places[drawn.token];
  return drawn;
}

template <typename Real>
Drawn<Real> draw_row(const Real* x, std::int64_t size, const Filters& filters, Real uniform, Scratch<Real>& scratch) {
  // below 1 by more than a rounding error; and NaN becomes 0
  const Real u = uniform > 0 ? std::min(uniform, 1 - std::numeric_limits<Real>::epsilon()) : 0;
  if (filters.temperature == 0) return draw_greedily(x, size, scratch);
  const Real scale = static_cast<Real>(1 / filters.temperature);
  const bool filtered = (filters.top_k > 0 && filters.top_k < size) || filters.top_p < 1 || filters.min_p > 0;
  return filtered ? draw_filtered(x, size, filters, scale, u, scratch) : draw(x, size, scale, u, scratch);
}

// The row in the precision of the results.
template <typename Real>
const Real* widened(const Real* x, std::int64_t, Scratch<Real>&) {
  return x;
}

TWINHEAD_CLONES void widen_all(const BFloat16* __restrict x, std::int64_t size, float* __restrict wide) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) wide[i] = widen(x[i]);
}

const float* widened(const BFloat16* x, std::int64_t size, Scratch<float>& scratch) {
  float* wide = at_least(scratch.logits, size);
  widen_all(x, size, wide);
  return wide;
}

}  // namespace

template <typename T>
void sample(const SampleArrays<T>& arrays, const Filters& filters, int threads) {
  using Real = typename SampleArrays<T>::Real;
  const bool parallel = arrays.rows > 1 && arrays.rows * arrays.words >= kParallelElements;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (parallel)
  for (std::int64_t row = 0; row < arrays.rows; ++row) {
    thread_local Scratch<Real> scratch;
    const Real* x = widened(arrays.logits + row * arrays.stride, arrays.words, scratch);
    const Drawn<Real> drawn = draw_row(x, arrays.words, filters, arrays.uniforms[row], scratch);
    arrays.tokens[row] = drawn.token;
    arrays.logprobs[row] = drawn.logprob;
  }
}

template void sample<float>(const SampleArrays<float>&, const Filters&, int);
template void sample<double>(const SampleArrays<double>&, const Filters&, int);
template void sample<BFloat16>(const SampleArrays<BFloat16>&, const Filters&, int);

}  // namespace twinhead
