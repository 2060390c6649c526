// Inverse-transform sampling. Without a filter one pass over the row sums the weights block by block, relative to the
// largest logit so far, and a second touch of one block finds the word. A filter keeps the first so many words, in
// falling order of the logits. Where these end is found by halving an interval of logits, each time in one pass over the
// row, until few words lie in it; only those are put in order.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace twinhead {

namespace {

constexpr std::int64_t kBlock = 512;  // words whose weights are summed in the precision of the logits
constexpr std::int64_t kLine = 32;    // words that are stepped over together
constexpr std::int64_t kFew = 128;    // words that are put in order at once
constexpr int kHalvings = 14;         // of an interval that is to hold no more of them; equals cannot be parted

template <typename Real>
struct Block {
  Real sum;   // of the words' weights
  Real peak;  // the largest logit up to here
};

template <typename Real>
struct Word {
  Real logit, weight;
  std::int64_t place;
};

// Falling order of the logits, and of equal ones the rising order of the places.
template <typename Real>
bool ahead(const Word<Real>& a, const Word<Real>& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.place < b.place);
}

template <typename Real>
struct Row {
  const Real* x;
  const Real* weights;
  std::int64_t size;
  Real peak, scale;
};

// The memory of one thread, kept from call to call.
template <typename Real>
struct Scratch {
  std::vector<Block<Real>> blocks;
  std::vector<double> cumulative;  // over blocks
  std::vector<Real> logits, weights;
  std::vector<Word<Real>> words;
};

// The vector's memory, which only ever grows.
template <typename T>
T* at_least(std::vector<T>& vector, std::int64_t size) {
  if (static_cast<std::int64_t>(vector.size()) < size) vector.resize(size);
  return vector.data();
}

struct Measure {
  double mass;
  std::int64_t count;
};

// What a filter keeps: every word that is not behind `last`, and how much that is.
template <typename Real>
struct Kept {
  Word<Real> last;
  Measure measure;
};

template <typename T>
struct Drawn {
  std::int64_t token;
  T logprob;
};

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
  for_blocks<kBlock>(size, [&](std::int64_t begin, std::int64_t length) { peak = largest(x + begin, length, peak); });
  return peak;
}

// The sums are relative to the peak of the last block, which is that of the row.
template <typename Real>
TWINHEAD_CLONES void sum_blocks(const Real* __restrict x, std::int64_t size, Real scale, Block<Real>* blocks) {
  Real peak = std::numeric_limits<Real>::lowest();
  Block<Real>* block = blocks;
  for_blocks<kBlock>(size, [&](std::int64_t begin, std::int64_t length) {
    peak = largest(x + begin, length, peak);
    *block++ = {sum_of_weights(x + begin, length, peak, scale), peak};
  });
  while (block-- != blocks) block->sum *= exp_nonpositive((block->peak - peak) * scale);
}

template <typename Real>
TWINHEAD_CLONES double weigh(const Real* __restrict x, std::int64_t size, Real peak, Real scale,
                             Real* __restrict weights) {
  double total = 0;
  for_blocks<kBlock>(size, [&](std::int64_t begin, std::int64_t length) {
    total += write_weights(x + begin, length, peak, scale, weights + begin);
  });
  return total;
}

// Of the words at or above `lowest`.
template <typename Real>
TWINHEAD_CLONES Measure measure(const Real* __restrict x, const Real* __restrict weights, std::int64_t size,
                                Real lowest) {
  Measure total{0, 0};
  for_blocks<kBlock>(size, [&](std::int64_t begin, std::int64_t length) {
    add_measure(x + begin, weights + begin, length, lowest, total);
  });
  return total;
}

// Collects the words with lowest <= x < ceiling.
template <typename Real>
TWINHEAD_CLONES void collect(const Real* __restrict x, const Real* __restrict weights, std::int64_t size, Real lowest,
                             Real ceiling, std::vector<Word<Real>>& words) {
  std::int64_t count = 0;
  for (std::int64_t begin = 0; begin < size; begin += kLine) {
    const std::int64_t end = size - begin < kLine ? size : begin + kLine;
    int any = 0;
#pragma omp simd reduction(| : any)
    for (std::int64_t i = begin; i < end; ++i) any |= (x[i] >= lowest) & (x[i] < ceiling);
    if (!any) continue;
    words.resize(count + kLine);
    for (std::int64_t i = begin; i < end; ++i) {
      words[count] = {x[i], weights[i], i};
      count += (x[i] >= lowest) & (x[i] < ceiling);
    }
  }
  words.resize(count);
}

// The fewest of the words, from the likeliest downwards, whose measure is enough; that of `limit` must be.
template <typename Real, typename Enough>
Kept<Real> fewest(const Row<Real>& row, const Kept<Real>& limit, Enough enough, std::vector<Word<Real>>& words) {
  Real lowest = limit.last.logit, ceiling = std::numeric_limits<Real>::infinity(), top = row.peak, step = 4 / row.scale;
  std::int64_t left = limit.measure.count;
  Measure above{0, 0};  // of everything from the ceiling upwards
  for (int i = 0; i < kHalvings && left > kFew; ++i) {
    const Real pivot = std::max(top - step, lowest / 2 + top / 2);
    if (!(pivot > lowest && pivot < ceiling)) break;
    const Measure part = measure(row.x, row.weights, row.size, pivot);
    if (enough(part)) {
      left = part.count - above.count;
      lowest = pivot;
    } else {
      left -= part.count - above.count;
      ceiling = top = pivot;
      above = part;
    }
    step *= 2;
  }
  collect(row.x, row.weights, row.size, lowest, ceiling, words);
  if (words.empty()) return limit;  // a rounding error short of everything
  auto begin = words.begin(), end = words.end();
  const auto with = [](Measure sum, const Word<Real>& word) { return Measure{sum.mass + word.weight, sum.count + 1}; };
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, ahead<Real>);
    const Measure upper = std::accumulate(begin, middle, above, with);
    if (enough(upper)) {
      end = middle;
    } else {
      begin = middle;
      above = upper;
    }
  }
  return {*begin, with(above, *begin)};
}

// top-k, then top-p of what that keeps, then min-p of what that keeps.
template <typename Real>
Word<Real> last_kept(const Row<Real>& row, double total, const Filters& filters, std::vector<Word<Real>>& words) {
  Kept<Real> kept{{-std::numeric_limits<Real>::infinity(), 0, row.size}, {total, row.size}};
  if (filters.top_k > 0 && filters.top_k < row.size) {
    kept = fewest(row, kept, [&](Measure part) { return part.count >= filters.top_k; }, words);
  }
  if (filters.top_p < 1) {
    const double wanted = filters.top_p * kept.measure.mass;
    const Kept<Real> nucleus = fewest(row, kept, [&](Measure part) { return part.mass >= wanted; }, words);
    if (ahead(nucleus.last, kept.last)) kept = nucleus;
  }
  const Word<Real> likely{static_cast<Real>(row.peak + std::log(filters.min_p) * filters.temperature), 0, row.size};
  return ahead(likely, kept.last) ? likely : kept.last;
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

// The word at which the cumulative weight of the kept ones exceeds u times their sum.
template <typename Real>
Drawn<Real> draw(const Row<Real>& row, const Word<Real>& last, double u, const std::vector<double>& cumulative) {
  const double total = cumulative.back();
  if (!(total > 0)) return {row.size - 1, std::numeric_limits<Real>::quiet_NaN()};
  const auto found = std::upper_bound(cumulative.begin(), cumulative.end() - 1, u * total);
  const double before = found == cumulative.begin() ? 0 : found[-1];
  const std::int64_t begin = (found - cumulative.begin()) * kBlock, length = std::min(kBlock, row.size - begin);
  Real weights[kBlock];
  weigh(row.x + begin, length, row.peak, row.scale, weights);
  for (std::int64_t i = 0; i < length; ++i) {
    if (ahead(last, {row.x[begin + i], 0, begin + i})) weights[i] = 0;
  }
  const std::int64_t token = begin + place_of(weights, length, u * total - before);
  return {token, (row.x[token] - row.peak) * row.scale - Real(std::log(total))};
}

template <typename Real>
Drawn<Real> draw_unfiltered(const Real* x, std::int64_t size, Real scale, double u, Scratch<Real>& scratch) {
  scratch.blocks.resize((size + kBlock - 1) / kBlock);
  sum_blocks(x, size, scale, scratch.blocks.data());
  scratch.cumulative.clear();
  double total = 0;
  for (const Block<Real>& block : scratch.blocks) scratch.cumulative.push_back(total += block.sum);
  const Row<Real> row{x, nullptr, size, scratch.blocks.back().peak, scale};
  return draw(row, {-std::numeric_limits<Real>::infinity(), 0, size}, u, scratch.cumulative);
}

// The likeliest word; of several the first.
template <typename Real>
Drawn<Real> draw_greedily(const Real* x, std::int64_t size, Scratch<Real>& scratch) {
  const Drawn<Real> any = draw_unfiltered(x, size, Real(1), 0, scratch);
  if (std::isnan(any.logprob)) return any;
  const Real peak = scratch.blocks.back().peak;
  std::int64_t token = 0;
  while (scratch.blocks[token / kBlock].peak < peak) token += kBlock;
  while (x[token] != peak) ++token;
  return {token, -Real(std::log(scratch.cumulative.back()))};
}

template <typename Real>
Drawn<Real> draw_filtered(const Real* x, std::int64_t size, const Filters& filters, Real scale, double u,
                          Scratch<Real>& scratch) {
  Real* weights = at_least(scratch.weights, size);
  const Row<Real> row{x, weights, size, largest_of_row(x, size), scale};
  const double mass = weigh(x, size, row.peak, scale, weights);
  if (!(mass > 0)) return {size - 1, std::numeric_limits<Real>::quiet_NaN()};
  const Word<Real> last = last_kept(row, mass, filters, scratch.words);
  const Real higher = std::nextafter(last.logit, std::numeric_limits<Real>::infinity());
  scratch.cumulative.clear();
  double total = 0;
  for (std::int64_t begin = 0; begin < size; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, size), turn = std::clamp(last.place + 1, begin, end);
    total += measure(x + begin, weights + begin, turn - begin, last.logit).mass;
    total += measure(x + turn, weights + turn, end - turn, higher).mass;
    scratch.cumulative.push_back(total);
  }
  return draw(row, last, u, scratch.cumulative);
}

template <typename Real>
Drawn<Real> draw_row(const Real* x, std::int64_t size, const Filters& filters, Real uniform, Scratch<Real>& scratch) {
  // below 1 by more than a rounding error; and NaN becomes 0
  const Real u = uniform > 0 ? std::min(uniform, 1 - std::numeric_limits<Real>::epsilon()) : 0;
  if (filters.temperature == 0) return draw_greedily(x, size, scratch);
  const Real scale = static_cast<Real>(1 / filters.temperature);
  const bool filtered = (filters.top_k > 0 && filters.top_k < size) || filters.top_p < 1 || filters.min_p > 0;
  return filtered ? draw_filtered(x, size, filters, scale, u, scratch) : draw_unfiltered(x, size, scale, u, scratch);
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
