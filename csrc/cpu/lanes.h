// Vectors of SOFTTOPK_BYTES bytes, for sweeps.cpp alone: conversions of half precision, the blocks
// of a row, sums over them, and the exponential. With the vector extensions of GCC and Clang, which
// map to any instruction set; a block is a few vectors.
#pragma once

#ifndef __GNUC__
#error "csrc/cpu needs the vector extensions of GCC or Clang"
#endif

#include <cstdint>
#if SOFTTOPK_BYTES == 64
#include <immintrin.h>
#endif

#include "sweeps.h"

#define INLINE inline __attribute__((always_inline))
#define LAMBDA_INLINE __attribute__((always_inline))

namespace softtopk::cpu::SOFTTOPK_ISA {
namespace {

struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(SOFTTOPK_BYTES)));
  typedef int32_t I __attribute__((vector_size(SOFTTOPK_BYTES)));
  typedef uint32_t U __attribute__((vector_size(SOFTTOPK_BYTES)));
  typedef uint16_t Narrow __attribute__((vector_size(SOFTTOPK_BYTES / 2)));
  static constexpr float infinity = __builtin_inff();
  static constexpr float rounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int mantissa = 23;
  static constexpr float underflow = -126, smallest = 0x1p-126f;
};

template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(SOFTTOPK_BYTES)));
  typedef int64_t I __attribute__((vector_size(SOFTTOPK_BYTES)));
  typedef uint64_t U __attribute__((vector_size(SOFTTOPK_BYTES)));
  static constexpr double infinity = __builtin_inf();
  static constexpr double rounder = 6755399441055744.;  // 1.5 * 2^52
  static constexpr int mantissa = 52;
  static constexpr double underflow = -1022, smallest = 0x1p-1022;
};

template <typename T>
using Vector = typename Lanes<T>::V;
template <typename T>
using Mask = typename Lanes<T>::I;

// As many as the registers hold: 32 of 64 bytes, 16 of the others.
constexpr int kVectors = SOFTTOPK_BYTES == 64 ? 4 : 2;
template <typename T>
constexpr int kWidth = SOFTTOPK_BYTES / sizeof(T);
template <typename T>
constexpr int kBlock = kVectors * kWidth<T>;
// Sums run in T for this many blocks, then move to double.
constexpr int kBlocksPerSum = 16;

template <typename T>
struct Block {
  Vector<T> v[kVectors];
};

INLINE Vector<float> widen(Lanes<float>::Narrow bits, half) {
  using U = Lanes<float>::U;
  const U wide = __builtin_convertvector(bits, U);
  // The exponent is moved by a product, which is exact for subnormals too.
  const Vector<float> scaled = (Vector<float>)((wide & 0x7fffu) << 13) * 0x1p112f;
  const U finite = (U)scaled;
  const U special = ((wide & 0x7fffu) << 13) | 0x7f800000u;
  const Mask<float> is_special = (wide & 0x7c00u) == 0x7c00u;
  return (Vector<float>)((is_special ? special : finite) | ((wide & 0x8000u) << 16));
}

INLINE Vector<float> widen(Lanes<float>::Narrow bits, bfloat) {
  return (Vector<float>)(__builtin_convertvector(bits, Lanes<float>::U) << 16);
}

// Round to nearest, ties to even.
INLINE Lanes<float>::Narrow narrow(Vector<float> value, half) {
  using U = Lanes<float>::U;
  const U bits = (U)value;
  const U magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14 adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
  const U subnormal = (U)((Vector<float>)magnitude + 0.5f) - 0x3f000000u;
  U result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? U{} + 0x7c00u : result;  // from 65520 on: infinity
  result = magnitude > 0x7f800000u ? U{} + 0x7e00u : result;
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), Lanes<float>::Narrow);
}

INLINE Lanes<float>::Narrow narrow(Vector<float> value, bfloat) {
  using U = Lanes<float>::U;
  const U bits = (U)value;
  U result = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  result = (bits & 0x7fffffffu) > 0x7f800000u ? U{} + 0x7fc0u : result;
  return __builtin_convertvector(result, Lanes<float>::Narrow);
}

template <typename T, typename In>
INLINE Block<T> load(const In* from) {
  Block<T> block;
  for (int j = 0; j < kVectors; ++j) {
    if constexpr (sizeof(In) == sizeof(T)) {
      __builtin_memcpy(&block.v[j], from + j * kWidth<T>, sizeof block.v[j]);
    } else {
      Lanes<float>::Narrow bits;
      __builtin_memcpy(&bits, from + j * kWidth<T>, sizeof bits);
      block.v[j] = widen(bits, In{});
    }
  }
  return block;
}

template <typename T, typename Out>
INLINE void store(const Block<T>& block, Out* to) {
  for (int j = 0; j < kVectors; ++j) {
    if constexpr (sizeof(Out) == sizeof(T)) {
      __builtin_memcpy(to + j * kWidth<T>, &block.v[j], sizeof block.v[j]);
    } else {
      const Lanes<float>::Narrow bits = narrow(block.v[j], Out{});
      __builtin_memcpy(to + j * kWidth<T>, &bits, sizeof bits);
    }
  }
}

// The first `count` elements of a block; the others become `rest`.
template <typename T, typename In>
INLINE Block<T> load_part(const In* from, int64_t count, T rest) {
  In padded[kBlock<T>] = {};
  __builtin_memcpy(padded, from, count * sizeof(In));
  Block<T> block = load<T>(padded);
  T values[kBlock<T>];
  store(block, values);
  for (int64_t i = count; i < kBlock<T>; ++i) values[i] = rest;
  return load<T>(values);
}

template <typename T, typename Out>
INLINE void store_part(const Block<T>& block, Out* to, int64_t count) {
  Out padded[kBlock<T>];
  store(block, padded);
  __builtin_memcpy(to, padded, count * sizeof(Out));
}

// Calls f(block, first, count) over the row; a part block is filled up with -inf, which belongs to
// B and weighs nothing. f returns true to stop.
template <typename T, typename In, typename F>
INLINE void for_blocks(const Row& row, F f) {
  const In* data = static_cast<const In*>(row.data);
  const T sign = row.negate ? -1 : 1;
  int64_t i = 0;
  for (; i + kBlock<T> <= row.n; i += kBlock<T>) {
    Block<T> x = load<T>(data + i);
    for (auto& v : x.v) v *= sign;
    if (f(x, i, static_cast<int64_t>(kBlock<T>))) return;
  }
  if (i < row.n) {
    Block<T> x = load_part<T>(data + i, row.n - i, -sign * Lanes<T>::infinity);
    for (auto& v : x.v) v *= sign;
    f(x, i, row.n - i);
  }
}

// How many elements of the last block are not the row's.
template <typename T>
INLINE int64_t filling(const Row& row) {
  return (kBlock<T> - row.n % kBlock<T>) % kBlock<T>;
}

template <typename T, typename In>
INLINE Block<T> load_at(const Row& row, int64_t first, int64_t count) {
  const In* data = static_cast<const In*>(row.data) + first;
  return count == kBlock<T> ? load<T>(data) : load_part<T>(data, count, T(0));
}

template <typename T, typename Out>
INLINE void store_at(const Block<T>& block, void* out, int64_t first, int64_t count) {
  Out* to = static_cast<Out*>(out) + first;
  if (count == kBlock<T>)
    store(block, to);
  else
    store_part(block, to, count);
}

template <typename T>
INLINE bool any(Mask<T> mask) {
  uint64_t words[SOFTTOPK_BYTES / 8], all = 0;
  __builtin_memcpy(words, &mask, sizeof words);
  for (const uint64_t word : words) all |= word;
  return all != 0;
}

// f over the lanes of a vector, in order. By way of a copy: a vector that is indexed by a variable
// would live in memory, not in a register.
template <typename R, typename V, typename F>
INLINE R fold(V v, R result, F f) {
  using T = decltype(V{}[0] + 0);
  T lanes[sizeof(V) / sizeof(T)];
  __builtin_memcpy(lanes, &v, sizeof lanes);
  for (const T lane : lanes) result = f(result, lane);
  return result;
}

template <typename M>
INLINE int64_t sum_of(M counts, int64_t sum) {
  return fold(counts, sum, [](int64_t a, int64_t b) { return a + b; });
}

template <typename T>
INLINE Vector<T> smaller(Vector<T> a, Vector<T> b) {
  return a < b ? a : b;
}

template <typename T>
INLINE Vector<T> larger(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

// A sum over blocks: in T lane by lane for a while, then in double.
template <typename T>
struct Sum {
  Vector<T> lanes[kVectors] = {};
  double sum = 0;
  INLINE void flush() {
    for (auto& v : lanes) {
      sum = fold(v, sum, [](double a, T b) { return a + b; });
      v = Vector<T>{};
    }
  }
};

// 2^y for y <= 0, and 0 below the smallest normal number. The error is below 1.5 ulp.
INLINE Vector<float> polynomial(Vector<float> f) {
  Vector<float> p = 0.000154531629f * f + 0.00133908634f;
  p = p * f + 0.00961808256f;
  p = p * f + 0.0555035711f;
  p = p * f + 0.240226508f;
  p = p * f + 0.693147188f;
  return p * f + 1.f;
}

INLINE Vector<double> polynomial(Vector<double> f) {
  Vector<double> p = 4.45496059818651839e-10 * f + 7.0725859492692237e-9;
  p = p * f + 1.01780624458457735e-7;
  p = p * f + 1.32154425879216897e-6;
  p = p * f + 0.0000152527338298361184;
  p = p * f + 0.000154035304417360502;
  p = p * f + 0.00133335581464169353;
  p = p * f + 0.00961812910760688853;
  p = p * f + 0.0555041086648215943;
  p = p * f + 0.240226506959100982;
  p = p * f + 0.693147180559945309;
  return p * f + 1.;
}

template <typename T>
INLINE Vector<T> exp2_nonpositive(Vector<T> y) {
  using U = typename Lanes<T>::U;
  const Vector<T> rounded = y + Lanes<T>::rounder;
  const Vector<T> fraction = y - (rounded - Lanes<T>::rounder);
  const U power = (U)polynomial(fraction) + ((U)rounded << Lanes<T>::mantissa);
  return y >= Lanes<T>::underflow ? (Vector<T>)power : Vector<T>{};
}

// log2 of e = exp(-|x - r| / alpha); -inf between r_B and r_A.
template <typename T>
INLINE Vector<T> exponent(Vector<T> x, Mask<T> above, const Scale<T>& scale) {
  const Vector<T> d = above ? scale.origin_A - x : x - scale.origin_B;
  return (d * scale.s1) * scale.s2;
}

// q of Pivot and LogPivot.
template <typename T, typename P>
INLINE Vector<T> weight(Vector<T> e, Mask<T> above, const P& pivot) {
  const Vector<T> least = above ? Vector<T>{} + pivot.e_A : Vector<T>{} + pivot.e_B;
  const Vector<T> unit = above ? Vector<T>{} + pivot.q_A : Vector<T>{} + pivot.q_B;
  return unit * (e >= least ? e : Vector<T>{});
}

template <typename T>
INLINE bool all_underflow(const Block<T>& y) {
  Mask<T> alive{};
  for (auto& v : y.v) alive |= v >= Lanes<T>::underflow;
  return !any<T>(alive);
}

// Writes the lanes of v that lie inside to out, packed; may write a whole vector. Returns how many.
#if SOFTTOPK_BYTES == 64
INLINE int64_t pack(Vector<float> v, Mask<float> inside, float* out) {
  const __mmask16 mask = _mm512_movepi32_mask((__m512i)inside);
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, v));
  return __builtin_popcount(mask);
}

INLINE int64_t pack(Vector<double> v, Mask<double> inside, double* out) {
  const __mmask8 mask = _mm512_movepi64_mask((__m512i)inside);
  _mm512_storeu_pd(out, _mm512_maskz_compress_pd(mask, v));
  return __builtin_popcount(mask);
}

// The same for the places of those lanes, the first of which is `first`.
INLINE void pack_places(int32_t first, Mask<float> inside, int32_t* out) {
  const __m512i places =
      _mm512_add_epi32(_mm512_set1_epi32(first),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __mmask16 mask = _mm512_movepi32_mask((__m512i)inside);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, places));
}

INLINE void pack_places(int32_t first, Mask<double> inside, int32_t* out) {
  const __m256i places =
      _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __mmask8 mask = _mm512_movepi64_mask((__m512i)inside);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_maskz_compress_epi32(mask, places));
}
#else
template <typename V, typename M, typename T>
INLINE int64_t pack(V v, M inside, T* out) {
  if (!any<T>(inside)) return 0;
  T lanes[kWidth<T>];
  decltype(M{}[0] + 0) marks[kWidth<T>];
  __builtin_memcpy(lanes, &v, sizeof lanes);
  __builtin_memcpy(marks, &inside, sizeof marks);
  int64_t count = 0;
  for (int l = 0; l < kWidth<T>; ++l) {
    out[count] = lanes[l];
    count -= marks[l];
  }
  return count;
}

template <typename M>
INLINE void pack_places(int32_t first, M inside, int32_t* out) {
  constexpr int width = sizeof(M) / sizeof(M{}[0]);
  decltype(M{}[0] + 0) marks[width];
  __builtin_memcpy(marks, &inside, sizeof marks);
  for (int l = 0; l < width; ++l) {
    *out = first + l;
    out -= marks[l];
  }
}
#endif

}  // namespace
}  // namespace softtopk::cpu::SOFTTOPK_ISA
