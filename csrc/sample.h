// One word per row by inverse transform, filtered by top-k, top-p and min-p without sorting.
#pragma once

#include <type_traits>

#include "array.h"
#include "simd.h"

namespace twinhead {

template <typename T>
struct SampleArrays {
  using Real = decltype(widen(T{}));

  const T* logits;             // (B, V); a row is contiguous
  std::int64_t rows;           // B
  std::int64_t words;          // V > 0
  std::int64_t stride;         // from row to row, in elements
  Array<const Real> uniforms;  // (B,)
  Array<std::int64_t> tokens;  // (B,), written
  Array<Real> logprobs;        // (B,), written
};

struct Filters {
  double temperature;  // 0: the likeliest word, and no filter
  std::int64_t top_k;  // 0: all
  double top_p;        // 1: all
  double min_p;        // 0: all
};

template <typename T>
void sample(const SampleArrays<T>& arrays, const Filters& filters, int threads);

}  // namespace twinhead
