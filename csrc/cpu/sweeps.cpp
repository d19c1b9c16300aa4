// The sweeps of sweeps.h for one instruction set, SOFTTOPK_ISA, on vectors of SOFTTOPK_BYTES bytes.
//
// setup.py compiles this file once per instruction set with its flags. Everything lives in a
// namespace of that name and nothing of the C++ library is instantiated here, so that no function
// compiled for a newer processor can be linked into the code that an older one runs.
// Written with GNU vector extensions (GCC, Clang): a block is four vectors.
#include "sweeps.h"

#ifndef __GNUC__
#error "csrc/cpu needs the vector extensions of GCC or Clang"
#endif
#ifndef SOFTTOPK_ISA
#define SOFTTOPK_ISA baseline
#define SOFTTOPK_BYTES 16
#endif
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
  static constexpr float underflow = -126;
};

template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(SOFTTOPK_BYTES)));
  typedef int64_t I __attribute__((vector_size(SOFTTOPK_BYTES)));
  typedef uint64_t U __attribute__((vector_size(SOFTTOPK_BYTES)));
  static constexpr double infinity = __builtin_inf();
  static constexpr double rounder = 6755399441055744.;  // 1.5 * 2^52
  static constexpr int mantissa = 52;
  static constexpr double underflow = -1022;
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

template <typename T>
INLINE bool all_underflow(const Block<T>& y) {
  Mask<T> alive{};
  for (auto& v : y.v) alive |= v >= Lanes<T>::underflow;
  return !any<T>(alive);
}

template <typename T, typename In>
Range<T> range(const Row& row) {
  using V = Vector<T>;
  constexpr T inf = Lanes<T>::infinity;
  Block<T> low, high;
  Mask<T> nan[kVectors] = {}, plus[kVectors] = {}, minus[kVectors] = {};
  for (int j = 0; j < kVectors; ++j) low.v[j] = V{} + inf, high.v[j] = V{} - inf;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t, int64_t) LAMBDA_INLINE {
    for (int j = 0; j < kVectors; ++j) {
      const V v = x.v[j];
      const Mask<T> up = v == inf, down = v == -inf;
      nan[j] |= v != v;
      plus[j] -= up;
      minus[j] -= down;
      low.v[j] = smaller<T>(down ? -v : v, low.v[j]);
      high.v[j] = larger<T>(up ? -v : v, high.v[j]);
    }
    return false;
  });
  Range<T> out{inf, -inf, 0, 0, false};
  for (int j = 0; j < kVectors; ++j) {
    out.nan |= any<T>(nan[j]);
    out.min = fold(low.v[j], out.min, [](T a, T b) { return b < a ? b : a; });
    out.max = fold(high.v[j], out.max, [](T a, T b) { return b > a ? b : a; });
    out.plus = sum_of(plus[j], out.plus);
    out.minus = sum_of(minus[j], out.minus);
  }
  out.minus -= (kBlock<T> - row.n % kBlock<T>) % kBlock<T>;  // the filling of the last block
  return out;
}

template <typename T, typename In>
Split<T> split(const Row& row, T c) {
  using V = Vector<T>;
  constexpr T inf = Lanes<T>::infinity;
  Block<T> low, high;
  Mask<T> count[kVectors] = {};
  for (int j = 0; j < kVectors; ++j) low.v[j] = V{} + inf, high.v[j] = V{} - inf;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t, int64_t) LAMBDA_INLINE {
    for (int j = 0; j < kVectors; ++j) {
      const V v = x.v[j];
      const Mask<T> above = v >= c;
      count[j] -= above;
      low.v[j] = smaller<T>(above ? v : V{} + inf, low.v[j]);
      high.v[j] = larger<T>(above ? V{} - inf : v, high.v[j]);
    }
    return false;
  });
  Split<T> out{0, inf, -inf};
  for (int j = 0; j < kVectors; ++j) {
    out.count = sum_of(count[j], out.count);
    out.r_A = fold(low.v[j], out.r_A, [](T a, T b) { return b < a ? b : a; });
    out.r_B = fold(high.v[j], out.r_B, [](T a, T b) { return b > a ? b : a; });
  }
  return out;
}

template <typename T, typename In>
Tails tails(const Row& row, const Scale<T>& scale) {
  using V = Vector<T>;
  Sum<T> P, Q;
  Mask<T> count[kVectors] = {};
  int blocks = 0;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t, int64_t) LAMBDA_INLINE {
    Block<T> y;
    Mask<T> above[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      above[j] = x.v[j] >= scale.r_A;
      count[j] -= above[j];
      const V exact = exponent<T>(x.v[j], above[j], scale);
      y.v[j] = above[j] | (x.v[j] <= scale.r_B) ? exact : V{} - Lanes<T>::infinity;
    }
    if (all_underflow(y)) return false;
    for (int j = 0; j < kVectors; ++j) {
      const V e = exp2_nonpositive<T>(y.v[j]);
      P.lanes[j] += above[j] ? e : V{};
      Q.lanes[j] += above[j] ? V{} : e;
    }
    if (++blocks % kBlocksPerSum == 0) P.flush(), Q.flush();
    return false;
  });
  P.flush(), Q.flush();
  Tails out{P.sum, Q.sum, 0};
  for (const auto& lanes : count) out.count = sum_of(lanes, out.count);
  return out;
}

template <typename T, typename In>
int64_t gather(const Row& row, T lo, T hi, T* out, int64_t capacity) {
  int64_t found = 0;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t, int64_t) LAMBDA_INLINE {
    Mask<T> inside{};
    for (auto& v : x.v) inside |= (v > lo) & (v < hi);
    if (!any<T>(inside)) return false;
    for (auto& v : x.v) {
      if (!any<T>((v > lo) & (v < hi))) continue;
      found = fold(v, found, [&](int64_t at, T value) {
        if (at < capacity) out[at] = value;
        return at + ((value > lo) & (value < hi));
      });
    }
    return false;
  });
  return found;
}

template <typename T, typename In>
T element(const Row& row, int64_t i) {
  const Row one{static_cast<const In*>(row.data) + i, 1, row.negate};
  T value = 0;
  for_blocks<T, In>(one, [&](const Block<T>& x, int64_t, int64_t) LAMBDA_INLINE {
    value = x.v[0][0];
    return true;
  });
  return value;
}

template <typename T, typename In>
int64_t find(const Row& row, T value) {
  int64_t index = -1;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t first, int64_t) LAMBDA_INLINE {
    Mask<T> equal{};
    for (auto& v : x.v) equal |= v == value;
    if (!any<T>(equal)) return false;
    T values[kBlock<T>];
    store(x, values);
    for (index = first; values[index - first] != value; ++index) {
    }
    return true;
  });
  return index;
}

template <typename T, typename In>
void probabilities(const Row& row, const Scale<T>& scale, T h_A, T h_B, void* p) {
  using V = Vector<T>;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t first, int64_t count) LAMBDA_INLINE {
    Block<T> y, out;
    Mask<T> above[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      above[j] = x.v[j] >= scale.r_A;
      y.v[j] = exponent<T>(x.v[j], above[j], scale);
      out.v[j] = above[j] ? V{} + T(1) : V{};
    }
    if (!all_underflow(y))
      for (int j = 0; j < kVectors; ++j) {
        const V e = exp2_nonpositive<T>(y.v[j]);
        out.v[j] = above[j] ? T(1) - h_A * e : h_B * e;
      }
    store_at<T, In>(out, p, first, count);
    return false;
  });
}

template <typename T, typename In>
Means means(const Row& row, const Row& v, const Scale<T>& scale, const Pivot<T>& pivot) {
  using V = Vector<T>;
  Sum<T> sum_v, sum_t;
  int blocks = 0;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t first, int64_t count) LAMBDA_INLINE {
    Block<T> y;
    Mask<T> above[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      above[j] = x.v[j] >= scale.r_A;
      y.v[j] = exponent<T>(x.v[j], above[j], scale);
    }
    if (all_underflow(y)) return false;  // so v is not read where nothing depends on it
    const Block<T> g = load_at<T, In>(v, first, count);
    for (int j = 0; j < kVectors; ++j) {
      const V q = (above[j] ? V{} + pivot.q_A : V{} + pivot.q_B) * exp2_nonpositive<T>(y.v[j]);
      const V dt = ((x.v[j] - pivot.x) * scale.s1) * scale.s2;
      sum_v.lanes[j] += q == T(0) ? V{} : q * (g.v[j] - pivot.v);
      sum_t.lanes[j] += q == T(0) ? V{} : q * dt;
    }
    if (++blocks % kBlocksPerSum == 0) sum_v.flush(), sum_t.flush();
    return false;
  });
  sum_v.flush(), sum_t.flush();
  return {sum_v.sum, sum_t.sum};
}

template <typename T, typename In>
double gradient(const Row& row, const Row& v, const Scale<T>& scale, const Pivot<T>& pivot,
                const Means& means, void* grad_x) {
  using V = Vector<T>;
  const T mean_v = static_cast<T>(means.v), mean_t = static_cast<T>(means.t);
  const T sign = row.negate ? -1 : 1;
  Sum<T> covariance;
  int blocks = 0;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t first, int64_t count) LAMBDA_INLINE {
    Block<T> y, out;
    Mask<T> above[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      above[j] = x.v[j] >= scale.r_A;
      y.v[j] = exponent<T>(x.v[j], above[j], scale);
      out.v[j] = V{};
    }
    if (!all_underflow(y)) {
      const Block<T> g = load_at<T, In>(v, first, count);
      for (int j = 0; j < kVectors; ++j) {
        const V e = exp2_nonpositive<T>(y.v[j]);
        const V q = (above[j] ? V{} + pivot.q_A : V{} + pivot.q_B) * e;
        const V s = (above[j] ? V{} + pivot.s_A : V{} + pivot.s_B) * e;
        const V dv = (q == T(0) ? V{} : g.v[j] - pivot.v) - mean_v;
        const V dt = ((x.v[j] - pivot.x) * scale.s1) * scale.s2 - mean_t;
        covariance.lanes[j] += q == T(0) ? V{} : q * dt * dv;
        out.v[j] = (e == T(0)) | (s == T(0)) ? V{} : s * dv * sign;
      }
      if (++blocks % kBlocksPerSum == 0) covariance.flush();
    }
    store_at<T, In>(out, grad_x, first, count);
    return false;
  });
  covariance.flush();
  return covariance.sum;
}

template <typename T, typename In>
void mask(const Row& row, T value, int64_t ties, void* out) {
  using V = Vector<T>;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t first, int64_t count) LAMBDA_INLINE {
    Block<T> ones;
    Mask<T> equal{};
    for (int j = 0; j < kVectors; ++j) {
      ones.v[j] = x.v[j] > value ? V{} + T(1) : V{};
      equal |= x.v[j] == value;
    }
    if (ties > 0 && any<T>(equal)) {
      T values[kBlock<T>], marks[kBlock<T>];
      store(x, values), store(ones, marks);
      for (int64_t i = 0; i < count && ties > 0; ++i)
        if (values[i] == value) marks[i] = 1, --ties;
      ones = load<T>(marks);
    }
    store_at<T, In>(ones, out, first, count);
    return false;
  });
}

template <typename T, typename In>
void indices(const Row& row, T value, int64_t ties, int64_t* out) {
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t first, int64_t count) LAMBDA_INLINE {
    Mask<T> chosen{};
    for (auto& v : x.v) chosen |= ties > 0 ? v >= value : v > value;
    if (!any<T>(chosen)) return false;
    T values[kBlock<T>];
    store(x, values);
    for (int64_t i = 0; i < count; ++i)
      if (values[i] > value || (values[i] == value && ties-- > 0)) *out++ = first + i;
    return false;
  });
}

template <typename T, typename In>
void fill(const Row& row, T value, void* out) {
  Block<T> block;
  for (auto& v : block.v) v = Vector<T>{} + value;
  for (int64_t i = 0; i < row.n; i += kBlock<T>) {
    const int64_t left = row.n - i;
    store_at<T, In>(block, out, i, left < kBlock<T> ? left : kBlock<T>);
  }
}

}  // namespace

template <typename T, typename In>
constexpr Sweeps<T> kTable{
    range<T, In>,         split<T, In>, tails<T, In>,    gather<T, In>, element<T, In>, find<T, In>,
    probabilities<T, In>, means<T, In>, gradient<T, In>, mask<T, In>,   indices<T, In>, fill<T, In>,
};

extern const Sweeps<float> from_float32 = kTable<float, float>;
extern const Sweeps<float> from_float16 = kTable<float, half>;
extern const Sweeps<float> from_bfloat16 = kTable<float, bfloat>;
extern const Sweeps<double> from_float64 = kTable<double, double>;

}  // namespace softtopk::cpu::SOFTTOPK_ISA
