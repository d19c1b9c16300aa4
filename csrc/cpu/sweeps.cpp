// The sweeps of sweeps.h for one instruction set, SOFTTOPK_ISA, on vectors of SOFTTOPK_BYTES bytes.
//
// setup.py compiles this file once per instruction set with its flags. Everything lives in a
// namespace of that name and nothing of the C++ library is instantiated here, so that no function
// compiled for a newer processor can be linked into the code that an older one runs.
#include "sweeps.h"

#include "lanes.h"
#include "log_sweeps.h"
#include "sparse_sweeps.h"

namespace softtopk::cpu::SOFTTOPK_ISA {
namespace {

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
  out.minus -= filling<T>(row);
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
  Mask<T> count[kVectors] = {}, below[kVectors] = {};
  int blocks = 0;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t, int64_t) LAMBDA_INLINE {
    Block<T> y;
    Mask<T> above[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      above[j] = x.v[j] >= scale.r_A;
      const Mask<T> under = x.v[j] <= scale.r_B;
      count[j] -= above[j];
      below[j] -= under;
      const V exact = exponent<T>(x.v[j], above[j], scale);
      y.v[j] = above[j] | under ? exact : V{} - Lanes<T>::infinity;
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
  Tails out{P.sum, Q.sum, 0, 0};
  for (const auto& lanes : count) out.count = sum_of(lanes, out.count);
  for (const auto& lanes : below) out.below = sum_of(lanes, out.below);
  out.below -= filling<T>(row);
  return out;
}

template <typename T, typename In>
int64_t gather(const Row& row, T lo, T hi, T* out, int64_t capacity) {
  static_assert(kWidth<T> <= kGatherRoom);
  int64_t found = 0;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t, int64_t) LAMBDA_INLINE {
    for (auto& v : x.v)
      if (found <= capacity) found += pack(v, (v > lo) & (v < hi), out + found);
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
void sample(const Row& row, T* out) {
  In places[kPlaces];
  for (int i = 0; i < kPlaces; ++i)
    places[i] =
        static_cast<const In*>(row.data)[row.n / kPlaces * i + row.n % kPlaces * i / kPlaces];
  for_blocks<T, In>({places, kPlaces, row.negate},
                    [&](const Block<T>& x, int64_t first, int64_t) LAMBDA_INLINE {
                      store(x, out + first);
                      return false;
                    });
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
      const V q = weight<T>(exp2_nonpositive<T>(y.v[j]), above[j], pivot);
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
  const T unit = row.negate ? -pivot.s : pivot.s;
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
        const V q = weight<T>(e, above[j], pivot);
        const V s = (above[j] ? V{} + pivot.s_A : V{} + pivot.s_B) * e;
        const V dv = (e == T(0) ? V{} : g.v[j] - pivot.v) - mean_v;
        const V dt = ((x.v[j] - pivot.x) * scale.s1) * scale.s2 - mean_t;
        covariance.lanes[j] += q == T(0) ? V{} : q * dt * dv;
        out.v[j] = (e == T(0)) | (s == T(0)) ? V{} : s * dv * unit;
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
Counts counts(const Row& row, T value) {
  Mask<T> above[kVectors] = {}, equal[kVectors] = {};
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t, int64_t) LAMBDA_INLINE {
    for (int j = 0; j < kVectors; ++j) {
      above[j] -= x.v[j] > value;
      equal[j] -= x.v[j] == value;
    }
    return false;
  });
  Counts out{0, 0};
  for (int j = 0; j < kVectors; ++j) {
    out.above = sum_of(above[j], out.above);
    out.equal = sum_of(equal[j], out.equal);
  }
  return out;
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
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t first, int64_t) LAMBDA_INLINE {
    Mask<T> chosen{};
    for (auto& v : x.v) chosen |= v >= value;
    if (!any<T>(chosen)) return false;
    for (int j = 0; j < kVectors; ++j) {
      if (!any<T>(x.v[j] >= value)) continue;
      fold(x.v[j], first + j * kWidth<T>, [&](int64_t i, T lane) {
        if (lane > value || (lane == value && ties-- > 0)) *out++ = i;
        return i + 1;
      });
    }
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
    range<T, In>,
    split<T, In>,
    tails<T, In>,
    gather<T, In>,
    element<T, In>,
    sample<T, In>,
    find<T, In>,
    probabilities<T, In>,
    means<T, In>,
    gradient<T, In>,
    log_probabilities<T, In>,
    log_means<T, In>,
    log_gradient<T, In>,
    counts<T, In>,
    mask<T, In>,
    indices<T, In>,
    fill<T, In>,
    activate<T, In>,
    keep<T, In>,
    accumulate<T, In>,
    finish<T, In>,
    write<T, In>,
};

extern const Sweeps<float> from_float32 = kTable<float, float>;
extern const Sweeps<float> from_float16 = kTable<float, half>;
extern const Sweeps<float> from_bfloat16 = kTable<float, bfloat>;
extern const Sweeps<double> from_float64 = kTable<double, double>;

}  // namespace softtopk::cpu::SOFTTOPK_ISA
