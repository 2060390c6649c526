// The end of a head on the CPU: each thread takes whole rows, and a row is read once for each thing that is asked of it.
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

namespace twinhead {

namespace {

constexpr std::int64_t kPiece = 1024;  // words whose logits wait in a core's first cache between maximum and sum

// As in kernels/_surrogate.py and kernels/_estimators.py.
constexpr int kLogRatioLimit = 20;
constexpr int kExponentLimit = 20;

// LogitShape in the precision of the products: z = scale * (x + bias), or outer * tanh(scale * (x + bias)).
template <typename T>
struct Curve {
  bool capped;
  T scale, outer;

  explicit Curve(const LogitShape& shape)
      : capped(shape.softcap < std::numeric_limits<double>::infinity()),
        scale(static_cast<T>(capped ? shape.scale / shape.softcap : shape.scale)),
        outer(static_cast<T>(capped ? shape.softcap / shape.temperature : 1)) {}
};

// tanh(y) = -m / (2 + m) for m = e^(-2|y|) - 1, which is built like e^x of simd.h and loses no digits near 0.
template <typename T>
TWINHEAD_INLINE T hyperbolic_tangent(T y) {
  using F = Floating<T>;
  using Bits = typename F::Bits;
  const T doubled = y < 0 ? 2 * y : -2 * y;
  const T x = doubled < F::kLowest ? F::kLowest : doubled;
  const T rounded = x * F::kLog2E + F::kRound;
  const T n = rounded - F::kRound;
  const T r = (x - n * F::kLn2High) - n * F::kLn2Low;
  const T power = bits_as<T>((bits_as<Bits>(rounded) << F::kMantissa) + F::kOne);  // 2^n
  const T m = power * (r + r * r * F::exp_tail(r)) + (power - 1);
  const T size = -m / (2 + m);
  return y < 0 ? -size : size;
}

// A logit, or where it is capped the tangent that outer makes a logit of.
template <bool capped, typename T>
TWINHEAD_INLINE T curved(T x, T bias, T scale) {
  const T y = scale * (x + bias);
  return capped ? hyperbolic_tangent(y) : y;
}

template <typename T>
struct Softmax {
  T peak;               // the largest logit
  double sum, sloped;   // of e^t and of t e^t, t = logit - peak
};

// z - peak, and no lower than where its exponential is 0; NaN stays.
template <typename T>
TWINHEAD_INLINE T below_peak(T z, T peak) {
  const T t = z - peak;
  return t < Floating<T>::kLowest ? Floating<T>::kLowest : t;
}

template <typename T>
TWINHEAD_INLINE void add_piece(const T* __restrict z, std::int64_t size, T largest, Softmax<T>& row) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  if (largest > row.peak) {
    if (row.peak > -kInfinity) {
      const double lift = static_cast<double>(row.peak) - largest, shrink = std::exp(lift);
      row.sloped = shrink * (row.sloped + lift * row.sum);
      row.sum *= shrink;
    }
    row.peak = largest;
  }
  const T peak = row.peak > -kInfinity ? row.peak : 0;  // nothing but excluded words until now
  T sum = 0, sloped = 0;
#pragma omp simd reduction(+ : sum, sloped)
  for (std::int64_t i = 0; i < size; ++i) {
    const T t = below_peak(z[i], peak), e = exp_in_range(t, 0);
    sum += e;
    sloped += t * e;
  }
  row.sum += sum;
  row.sloped += sloped;
}

template <bool capped, bool biased, typename T>
TWINHEAD_INLINE Softmax<T> softmax_of_curve(const T* __restrict x, const T* __restrict bias, std::int64_t words,
                                            const Curve<T>& curve) {
  const T scale = curve.scale, outer = curve.outer;
  Softmax<T> row{-std::numeric_limits<T>::infinity(), 0, 0};
  T z[kPiece];
  for (std::int64_t start = 0; start < words; start += kPiece) {
    const std::int64_t size = std::min(kPiece, words - start);
    T largest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : largest)
    for (std::int64_t i = 0; i < size; ++i) {
      const T y = curved<capped>(x[start + i], biased ? bias[start + i] : T(0), scale);
      z[i] = capped ? outer * y : y;
      largest = z[i] > largest ? z[i] : largest;
    }
    add_piece(z, size, largest, row);
  }
  return row;
}

template <typename T>
TWINHEAD_INLINE Softmax<T> softmax_of_row(const T* x, const T* bias, std::int64_t words, const Curve<T>& curve) {
  if (curve.capped) {
    return bias ? softmax_of_curve<true, true>(x, bias, words, curve)
                : softmax_of_curve<true, false>(x, bias, words, curve);
  }
  return bias ? softmax_of_curve<false, true>(x, bias, words, curve)
              : softmax_of_curve<false, false>(x, bias, words, curve);
}

// The gradient by a logit of slope * logprob + entropy_slope * entropy, away from the target, is
// -p (slope + entropy_slope (log p + entropy)) = e^t (base + tilt t).
template <typename T>
struct RowGradient {
  T peak, base, tilt;
};

template <bool capped, bool biased, typename T>
TWINHEAD_INLINE void gradient_of_curve(T* __restrict x, const T* __restrict bias, std::int64_t words,
                                       const Curve<T>& curve, const RowGradient<T>& row) {
  const T scale = curve.scale, outer = curve.outer, peak = row.peak;
  const T inner = capped ? scale * outer : scale;
  const T base = row.base * inner, tilt = row.tilt * inner;
#pragma omp simd
  for (std::int64_t i = 0; i < words; ++i) {
    const T y = curved<capped>(x[i], biased ? bias[i] : T(0), scale);
    const T t = below_peak(capped ? outer * y : y, peak);
    const T slope = exp_in_range(t, 0) * (base + tilt * t);
    x[i] = capped ? slope * (1 - y * y) : slope;
  }
}

template <typename T>
TWINHEAD_INLINE void gradient_of_row(T* x, const T* bias, std::int64_t words, const Curve<T>& curve,
                                     const RowGradient<T>& row) {
  if (curve.capped) {
    bias ? gradient_of_curve<true, true>(x, bias, words, curve, row)
         : gradient_of_curve<true, false>(x, bias, words, curve, row);
  } else {
    bias ? gradient_of_curve<false, true>(x, bias, words, curve, row)
         : gradient_of_curve<false, false>(x, bias, words, curve, row);
  }
}

// Clones of a template would have one name; these have their own.
TWINHEAD_CLONES Softmax<float> softmax(const float* x, const float* bias, std::int64_t words,
                                       const Curve<float>& curve) {
  return softmax_of_row(x, bias, words, curve);
}

TWINHEAD_CLONES Softmax<double> softmax(const double* x, const double* bias, std::int64_t words,
                                        const Curve<double>& curve) {
  return softmax_of_row(x, bias, words, curve);
}

TWINHEAD_CLONES void gradient(float* x, const float* bias, std::int64_t words, const Curve<float>& curve,
                              const RowGradient<float>& row) {
  gradient_of_row(x, bias, words, curve, row);
}

TWINHEAD_CLONES void gradient(double* x, const double* bias, std::int64_t words, const Curve<double>& curve,
                              const RowGradient<double>& row) {
  gradient_of_row(x, bias, words, curve, row);
}

// The tangent where the logits are capped, else the logit.
template <typename T>
T curve_at(const HeadBlock<T>& block, const Curve<T>& curve, const T* x, std::int64_t word) {
  const T bias = block.bias ? block.bias[word] : T(0);
  return curve.capped ? curved<true>(x[word], bias, curve.scale) : curved<false>(x[word], bias, curve.scale);
}

template <typename T>
void measure_row(const HeadBlock<T>& block, const Curve<T>& curve, std::int64_t r, Array<T> logprobs,
                 const Measures<T>& measures) {
  const std::int64_t target = block.targets[r];
  if (target < 0) {
    logprobs[r] = measures.entropy[r] = measures.peak[r] = measures.log_sum[r] = 0;
    return;
  }
  const T* x = block.products.data + r * block.words();
  const Softmax<T> row = softmax(x, block.bias.data, block.words(), curve);
  const double log_sum = std::log(row.sum);
  const T z = curve.outer * curve_at(block, curve, x, target);
  logprobs[r] = static_cast<T>((z - row.peak) - log_sum);
  measures.entropy[r] = static_cast<T>(log_sum - row.sloped / row.sum);
  measures.peak[r] = row.peak;
  measures.log_sum[r] = static_cast<T>(log_sum);
}

template <typename T>
void gradient_row(const HeadBlock<T>& block, const Curve<T>& curve, std::int64_t r, const Measures<T>& measures,
                  T slope, T entropy_slope) {
  const std::int64_t words = block.words(), target = block.targets[r];
  T* x = block.products.data + r * words;
  if (target < 0 || (slope == 0 && entropy_slope == 0)) {
    std::fill_n(x, words, T(0));
    return;
  }
  const T peak = measures.peak[r], log_sum = measures.log_sum[r], entropy = measures.entropy[r];
  const T share = std::exp(-log_sum);
  const T y = curve_at(block, curve, x, target);
  const T logprob = (curve.outer * y - peak) - log_sum, p = std::exp(logprob);
  gradient(x, block.bias.data, words, curve,
           RowGradient<T>{peak, -share * (slope + entropy_slope * (entropy - log_sum)), -share * entropy_slope});
  const T inner = curve.capped ? curve.scale * curve.outer * (1 - y * y) : curve.scale;
  const T from_entropy = p > 0 ? entropy_slope * p * (logprob + entropy) : T(0);
  x[target] = inner * (slope * -std::expm1(logprob) - from_entropy);  // 1 - p would lose digits
}

template <typename T>
T kl_slope(T d, int kl_estimator) {
  if (kl_estimator == 1) return 1;
  if (kl_estimator == 2) return d;
  return -d <= kExponentLimit ? -std::expm1(-d) : T(1);
}

// d loss / d logprob of one token, as Objective.slope says it.
template <typename T>
T token_slope(const TokenObjective<T>& objective, std::int64_t r, T logprob) {
  const T log_ratio = logprob - objective.old_logprobs[r], advantage = objective.advantages[r];
  const T ratio = std::exp(std::clamp(log_ratio, T(-kLogRatioLimit), T(kLogRatioLimit)));
  const T low = static_cast<T>(1 - objective.clip_low), high = static_cast<T>(1 + objective.clip_high);
  const T loss = -advantage * ratio;
  const bool clipped = -advantage * std::clamp(ratio, low, high) > loss;
  const bool bound = advantage < 0 && loss > -static_cast<T>(objective.dual_clip) * advantage;
  const bool free = !clipped && !bound && std::abs(log_ratio) <= kLogRatioLimit;
  T slope = free ? loss : T(0);
  if (objective.ref_logprobs && objective.kl_coef != 0) {
    slope += static_cast<T>(objective.kl_coef) * kl_slope(logprob - objective.ref_logprobs[r], objective.kl_estimator);
  }
  return slope / static_cast<T>(objective.divisor);
}

bool parallel(std::int64_t elements) { return elements >= kParallelElements; }

}  // namespace

template <typename T>
void measure_head(const HeadBlock<T>& block, Array<T> logprobs, const Measures<T>& measures, int threads) {
  const Curve<T> curve(block.shape);
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel(block.products.size))
  for (std::int64_t r = 0; r < block.rows(); ++r) measure_row(block, curve, r, logprobs, measures);
}

template <typename T>
void head_gradient(const HeadBlock<T>& block, const Measures<T>& measures, Array<const T> slopes,
                   Array<const T> entropy_slopes, int threads) {
  const Curve<T> curve(block.shape);
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel(block.products.size))
  for (std::int64_t r = 0; r < block.rows(); ++r) {
    gradient_row(block, curve, r, measures, slopes ? slopes[r] : T(0), entropy_slopes ? entropy_slopes[r] : T(0));
  }
}

template <typename T>
void learn_head(const HeadBlock<T>& block, Array<T> logprobs, const Measures<T>& measures,
                const TokenObjective<T>& objective, int threads) {
  const Curve<T> curve(block.shape);
  const T entropy_slope = static_cast<T>(-objective.entropy_coef / objective.divisor);
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel(block.products.size))
  for (std::int64_t r = 0; r < block.rows(); ++r) {
    measure_row(block, curve, r, logprobs, measures);
    gradient_row(block, curve, r, measures, token_slope(objective, r, logprobs[r]), entropy_slope);
  }
}

#define TWINHEAD_HEAD_OF(T)                                                                                        \
  template void measure_head<T>(const HeadBlock<T>&, Array<T>, const Measures<T>&, int);                           \
  template void head_gradient<T>(const HeadBlock<T>&, const Measures<T>&, Array<const T>, Array<const T>, int);    \
  template void learn_head<T>(const HeadBlock<T>&, Array<T>, const Measures<T>&, const TokenObjective<T>&, int)

TWINHEAD_HEAD_OF(float);
TWINHEAD_HEAD_OF(double);

}  // namespace twinhead
