// Arithmetic for loops that the compiler vectorises, and the macro that builds such a loop once per generation of CPU.
//
// A hot function is marked TWINHEAD_CLONES and takes plain __restrict pointers; what it calls is marked
// TWINHEAD_INLINE, because a function that stays a call would be compiled once, for the oldest machine. OpenMP's
// parallel regions stand in the caller: their bodies are functions of their own, which the clones do not reach.
//
// Everything here is a formula without a branch. NaN goes in and comes out. Errors are in units in the last place of
// the exact result, measured with and without fused multiply-add over every float whose result is a normal number and
// over 10^7 doubles: 1.02 for e^x, 0.96 for the logarithm, 0.98 and 0.94 for double.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

// Without this gcc takes every selection `a < b ? a : b` for a branch that might trap, and vectorises for AVX-512 only.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define TWINHEAD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TWINHEAD_CLONES
#endif

#if defined(_MSC_VER)
#define TWINHEAD_INLINE static __forceinline
#else
#define TWINHEAD_INLINE static inline __attribute__((always_inline))
#endif

namespace twinhead {

// A number of the format bfloat16: the upper half of a float.
struct BFloat16 {
  std::uint16_t bits;
};

// The same bits, read as another type of the same size.
template <typename To, typename From>
TWINHEAD_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as: the sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The number that arithmetic is done with.
TWINHEAD_INLINE float widen(float x) { return x; }
TWINHEAD_INLINE double widen(double x) { return x; }
TWINHEAD_INLINE float widen(BFloat16 x) { return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16); }

// What tells the formulas for float from those for double. The coefficients are minimax fits of our own.
template <typename T>
struct Floating;

template <>
struct Floating<float> {
  using Bits = std::uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr Bits kOne = 0x3f800000u;          // the bits of 1
  static constexpr Bits kRootHalf = 0x3f3504f3u;     // the bits of sqrt(1/2)
  static constexpr float kRound = 12582912.0f;       // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2High = 0.693145752f;    // few bits, so that its products with exponents are exact
  static constexpr float kLn2Low = 1.4286068e-6f;
  static constexpr float kLowest = -88.0f;           // e^x is below half of the smallest normal number
  static constexpr float kHighest = 89.0f;           // e^x is above the largest number
  static constexpr float kLowestPower = -125.0f;     // 2 to this, rounded either way, is a normal number

  // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2
  TWINHEAD_INLINE float exp_tail(float r) {
    return (((1.3814544e-3f * r + 8.3687447e-3f) * r + 4.1668391e-2f) * r + 0.1666652f) * r + 0.49999993f;
  }
  // 2^r for |r| <= 1/2, exact at 0
  TWINHEAD_INLINE float exp2_near(float r) {
    return ((((1.3264709e-3f * r + 9.6715335e-3f) * r + 5.550734e-2f) * r + 0.24022242f) * r + 0.69314698f) * r + 1.0f;
  }
  // (2 atanh(s) - 2 s) / s^3 as a polynomial in z = s^2, for numbers from sqrt(1/2) to sqrt(2)
  TWINHEAD_INLINE float log_tail(float z) {
    return ((0.23583557f * z + 0.28537239f) * z + 0.40000336f) * z + 0.66666666f;
  }
};

template <>
struct Floating<double> {
  using Bits = std::uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr Bits kOne = 0x3ff0000000000000u;
  static constexpr Bits kRootHalf = 0x3fe6a09e667f3bcdu;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2E = 1.4426950408889634;
  static constexpr double kLn2High = 0x1.62e42fefap-1;
  static constexpr double kLn2Low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double kLowest = -709.0;
  static constexpr double kHighest = 710.0;
  static constexpr double kLowestPower = -1021.0;

  TWINHEAD_INLINE double exp_tail(double r) {
    const double upper =
        ((((2.08266085099087493e-9 * r + 2.51120847418e-8) * r + 2.755758219306674e-7) * r + 2.75572347270921e-6) * r +
         2.4801586925830906e-5) * r + 1.98412698965159485e-4;
    return ((((upper * r + 1.3888888889116297e-3) * r + 8.3333333333169821e-3) * r + 4.16666666666660921e-2) * r +
            0.166666666666666835) * r + 0.5;
  }
  TWINHEAD_INLINE double exp2_near(double r) {
    const double upper =
        ((((4.4347685999749066e-10 * r + 7.0737909397419700e-9) * r + 1.0178199651712138e-7) * r +
          1.3215435240198704e-6) * r + 1.5252733492781656e-5) * r + 1.5403530457190621e-4;
    return (((((upper * r + 1.3333558146775144e-3) * r + 9.6181291075940632e-3) * r + 5.5504108664820080e-2) * r +
             0.24022650695910131) * r + 0.69314718055994533) * r + 1.0;
  }
  TWINHEAD_INLINE double log_tail(double z) {
    const double upper = ((0.147975058699089357 * z + 0.153139033889464942) * z + 0.18183569736570395) * z +
                         0.222221984759847848;
    return ((upper * z + 0.285714287432635988) * z + 0.399999999994110818) * z + 0.66666666666667349;
  }
};

// e^x * 2^-halvings for kLowest <= x <= kHighest: x = n ln 2 + r, a polynomial in r, and 2^n written into an exponent.
template <typename T>
TWINHEAD_INLINE T exp_in_range(T x, int halvings) {
  using F = Floating<T>;
  using Bits = typename F::Bits;
  const T rounded = x * F::kLog2E + F::kRound;
  const T n = rounded - F::kRound;
  const T r = (x - n * F::kLn2High) - n * F::kLn2Low;
  const T mantissa = T(1) + (r + r * r * F::exp_tail(r));
  const Bits one = F::kOne - (static_cast<Bits>(halvings) << F::kMantissa);
  return mantissa * bits_as<T>((bits_as<Bits>(rounded) << F::kMantissa) + one);
}

// e^x for x <= 0, the cheapest of these: -inf gives 0, and so does everything whose result is below the normal numbers
// by more than a factor of 2 (x < -87.7, for double x < -708.8).
template <typename T>
TWINHEAD_INLINE T exp_nonpositive(T x) {
  return exp_in_range(x < Floating<T>::kLowest ? Floating<T>::kLowest : x, 0);
}

// e^x for every x: inf above the largest number, 0 where the result would be below the normal numbers (from x < -86.99
// on, for double x < -708.04). Computed as half of itself, because 2^128 has no exponent of its own.
template <typename T>
TWINHEAD_INLINE T exponential(T x) {
  using F = Floating<T>;
  constexpr T kLowest = F::kLowest + F::kLn2High;
  const T raised = x < kLowest ? kLowest : x;
  return exp_in_range(raised > F::kHighest ? F::kHighest : raised, 1) * T(2);
}

// 2^(d * rate) for kLowestPower <= d * rate < 127 (for double 1023): the fewest operations, for sums. Within 2.2 units
// for float and 1.1 for double; without fused multiply-add also the rounding of the product, as in any exp(d * rate).
template <typename T>
TWINHEAD_INLINE T exp2_of_product(T d, T rate) {
  using F = Floating<T>;
  using Bits = typename F::Bits;
  const T rounded = d * rate + F::kRound;
  const T r = d * rate - (rounded - F::kRound);
  return bits_as<T>(bits_as<Bits>(F::exp2_near(r)) + (bits_as<Bits>(rounded) << F::kMantissa));
}

// The natural logarithm: -inf for 0 and below the normal numbers, inf for inf, NaN below 0.
// x = 2^n (1 + f) with 1 + f from sqrt(1/2) to sqrt(2), and log(1 + f) = 2 atanh(s) for s = f / (2 + f).
template <typename T>
TWINHEAD_INLINE T logarithm(T x) {
  using F = Floating<T>;
  using Bits = typename F::Bits;
  constexpr Bits kFraction = (Bits(1) << F::kMantissa) - 1;
  const Bits shifted = bits_as<Bits>(x) + (F::kOne - F::kRootHalf);
  constexpr T kBias = F::kRound + (F::kOne >> F::kMantissa);
  const T n = bits_as<T>(bits_as<Bits>(F::kRound) + (shifted >> F::kMantissa)) - kBias;
  const T f = bits_as<T>((shifted & kFraction) + F::kRootHalf) - T(1);
  const T s = f / (T(2) + f), z = s * s;
  const T found = n * F::kLn2High + (f - (s * (f - z * F::log_tail(z)) - n * F::kLn2Low));
  constexpr T kInfinity = std::numeric_limits<T>::infinity(), kNan = std::numeric_limits<T>::quiet_NaN();
  const T special = x > T(0) ? (x == kInfinity ? kInfinity : -kInfinity) : (x == T(0) ? -kInfinity : kNan);
  return x >= std::numeric_limits<T>::min() && x < kInfinity ? found : special;
}

// Calls f(begin, length) for every block. A length that the compiler knows keeps the sums of a loop in registers.
template <std::int64_t kBlock, typename F>
TWINHEAD_INLINE void for_blocks(std::int64_t size, F f) {
  std::int64_t begin = 0;
  for (; begin + kBlock <= size; begin += kBlock) f(begin, kBlock);
  if (begin < size) f(begin, size - begin);
}

}  // namespace twinhead
