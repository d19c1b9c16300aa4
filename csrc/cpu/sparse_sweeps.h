// The sweeps of the sparse path, for sweeps.cpp alone: over a row of pre-activations and its code,
// and over rows of the matrices that latents gather.
#pragma once

#include "lanes.h"

namespace softtopk::cpu::SOFTTOPK_ISA {
namespace {

// v in the row's type.
template <typename T, typename In>
INLINE Vector<T> rounded(Vector<T> v) {
  if constexpr (sizeof(In) == sizeof(T))
    return v;
  else
    return widen(narrow(v, In{}), In{});
}

template <typename T>
INLINE Block<T> thresholds_at(const Activation& activation, int64_t first, int64_t count) {
  T values[kBlock<T>];
  for (int64_t i = 0; i < kBlock<T>; ++i)
    values[i] = static_cast<T>(activation.thresholds[first + (i < count ? i : 0)]);
  return load<T>(values);
}

template <typename T, typename In>
bool activate(const Row& row, const Activation& activation, T* out) {
  using V = Vector<T>;
  Mask<T> nan{};
  const Row bias{activation.bias, row.n, false};
  for_blocks<T, In>(row, [&](const Block<T>& z, int64_t first, int64_t count) LAMBDA_INLINE {
    Block<T> a = z, threshold;
    for (auto& v : threshold.v) v = V{} + static_cast<T>(activation.threshold);
    if (activation.thresholds != nullptr) threshold = thresholds_at<T>(activation, first, count);
    if (activation.bias != nullptr) {
      const Block<T> b = load_at<T, In>(bias, first, count);
      for (int j = 0; j < kVectors; ++j) a.v[j] = rounded<T, In>(a.v[j] + b.v[j]);
    }
    for (int j = 0; j < kVectors; ++j) {
      nan |= a.v[j] != a.v[j];
      a.v[j] = a.v[j] > threshold.v[j] ? a.v[j] : V{};
    }
    store_at<T, T>(a, out, first, count);
    return false;
  });
  return any<T>(nan);
}

// The lanes equal to `value`, as long as there are ties left.
template <typename T>
void add_ties(const Block<T>& x, T value, int64_t& ties, Mask<T>* kept) {
  for (int j = 0; j < kVectors; ++j) {
    decltype(kept[0][0] + 0) marks[kWidth<T>];
    __builtin_memcpy(marks, &kept[j], sizeof marks);
    fold(x.v[j], 0, [&](int l, T lane) {
      if (lane == value && ties > 0) marks[l] = -1, --ties;
      return l + 1;
    });
    __builtin_memcpy(&kept[j], marks, sizeof marks);
  }
}

// Adds lanes that are kept to `elements` and their places to `indices`; without room for all, those
// left out are no longer `kept`.
template <typename T>
INLINE void copy_lanes(Vector<T> v, int32_t first, Mask<T>& kept, int64_t capacity,
                       int32_t* indices, T* elements, int64_t& count) {
  if (count + kWidth<T> <= capacity) {
    pack_places(first, kept, indices + count);
    count += pack(v, kept, elements + count);
    return;
  }
  decltype(kept[0] + 0) marks[kWidth<T>];
  __builtin_memcpy(marks, &kept, sizeof marks);
  fold(v, 0, [&](int l, T lane) {
    if (marks[l] && count++ < capacity)
      indices[count - 1] = first + l, elements[count - 1] = lane;
    else
      marks[l] = 0;
    return l + 1;
  });
  __builtin_memcpy(&kept, marks, sizeof marks);
}

template <typename T, typename In>
Kept keep(const Row& row, T value, int64_t ties, const Scale<T>& scale, const Pivot<T>* pivot,
          int64_t capacity, int32_t* indices, T* elements) {
  using V = Vector<T>;
  Kept out{0, 0, 0};
  Sum<T> sum_q, sum_t;
  int blocks = 0;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t first, int64_t) LAMBDA_INLINE {
    Mask<T> kept[kVectors], some{}, equal{};
    for (int j = 0; j < kVectors; ++j) {
      kept[j] = x.v[j] > value;
      some |= kept[j];
      equal |= x.v[j] == value;
    }
    if (ties > 0 && any<T>(equal)) {
      add_ties(x, value, ties, kept);
      some |= equal;
    }
    // With instructions for it a vector is packed in less time than it takes to see whether any
    // lane is kept.
    const bool at_once = SOFTTOPK_BYTES == 64 && out.count + kBlock<T> <= capacity;
    if (at_once || any<T>(some))
      for (int j = 0; j < kVectors; ++j)
        if (at_once || any<T>(kept[j]))
          copy_lanes(x.v[j], static_cast<int32_t>(first + j * kWidth<T>), kept[j], capacity,
                     indices, elements, out.count);
    if (pivot == nullptr) return false;
    Block<T> y;
    Mask<T> above[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      above[j] = x.v[j] >= scale.r_A;
      const V exact = exponent<T>(x.v[j], above[j], scale);
      y.v[j] = kept[j] ? V{} - Lanes<T>::infinity : exact;
    }
    if (all_underflow(y)) return false;
    for (int j = 0; j < kVectors; ++j) {
      const V q = weight<T>(exp2_nonpositive<T>(y.v[j]), above[j], *pivot);
      const V dt = ((x.v[j] - pivot->x) * scale.s1) * scale.s2;
      sum_q.lanes[j] += q;
      sum_t.lanes[j] += q == T(0) ? V{} : q * dt;
    }
    if (++blocks % kBlocksPerSum == 0) sum_q.flush(), sum_t.flush();
    return false;
  });
  sum_q.flush(), sum_t.flush();
  out.q = sum_q.sum, out.t = sum_t.sum;
  return out;
}

// One vector of elements; only the first `count` are there where that is less than its width.
template <typename T, typename In>
INLINE Vector<T> vector_at(const In* from, int64_t count = kWidth<T>) {
  Vector<T> v;
  if constexpr (sizeof(In) == sizeof(T)) {
    if (count < kWidth<T>) v = Vector<T>{};
    __builtin_memcpy(&v, from, count * sizeof(In));
  } else {
    Lanes<float>::Narrow bits{};
    __builtin_memcpy(&bits, from, count * sizeof(In));
    v = widen(bits, In{});
  }
  return v;
}

// f(first, count) for every vector of d elements.
template <typename T>
struct Whole {
  constexpr operator int64_t() const { return kWidth<T>; }
};

template <typename T, typename F>
INLINE void for_vectors(int64_t d, F f) {
  int64_t c = 0;
  for (; c + kWidth<T> <= d; c += kWidth<T>) f(c, Whole<T>{});
  if (c < d) f(c, d - c);
}

// `accumulate` for kRows rows at once: sum and along are read once for all.
template <typename T, typename In, int kRows, bool kDots>
INLINE void accumulate_rows(const In* matrix, int64_t d, const int32_t* places, const T* scales,
                            const In* along, T* sum, T* dots) {
  using V = Vector<T>;
  const In* rows[kRows];
  V products[kRows] = {};
  for (int r = 0; r < kRows; ++r) rows[r] = matrix + places[r] * d;
  for_vectors<T>(d, [&](int64_t c, auto count) LAMBDA_INLINE {
    V total = vector_at<T>(sum + c, count), w;
    if constexpr (kDots) w = vector_at<T>(along + c, count);
    for (int r = 0; r < kRows; ++r) {
      const V x = vector_at<T>(rows[r] + c, count);
      total += x * scales[r];
      if constexpr (kDots) products[r] += x * w;
    }
    __builtin_memcpy(sum + c, &total, count * sizeof(T));
  });
  if constexpr (kDots)
    for (int r = 0; r < kRows; ++r)
      dots[r] = fold(products[r], T(0), [](T a, T b) { return a + b; });
}

template <typename T, typename In, bool kDots>
INLINE void accumulate_all(const In* matrix, int64_t d, const int32_t* places, const T* scales,
                           int64_t count, const In* along, T* sum, T* dots) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    accumulate_rows<T, In, 4, kDots>(matrix, d, places + i, scales + i, along, sum, dots + i);
  if (count - i >= 2) {
    accumulate_rows<T, In, 2, kDots>(matrix, d, places + i, scales + i, along, sum, dots + i);
    i += 2;
  }
  if (i < count)
    accumulate_rows<T, In, 1, kDots>(matrix, d, places + i, scales + i, along, sum, dots + i);
}

template <typename T, typename In>
void accumulate(const void* matrix, int64_t d, const int32_t* places, const T* scales,
                int64_t count, const void* along, T* sum, T* dots) {
  const In *rows = static_cast<const In*>(matrix), *weight = static_cast<const In*>(along);
  if (along != nullptr)
    accumulate_all<T, In, true>(rows, d, places, scales, count, weight, sum, dots);
  else
    accumulate_all<T, In, false>(rows, d, places, scales, count, weight, sum, dots);
}

template <typename T, typename In>
T finish(const void* along, T part, int64_t d, T* sum) {
  Vector<T> squares{};
  for_vectors<T>(d, [&](int64_t c, auto count) LAMBDA_INLINE {
    Vector<T> v = vector_at<T>(sum + c, count);
    if (along != nullptr) {
      v -= vector_at<T>(static_cast<const In*>(along) + c, count) * part;
      __builtin_memcpy(sum + c, &v, count * sizeof(T));
    }
    squares += v * v;
  });
  return fold(squares, T(0), [](T a, T b) { return a + b; });
}

template <typename T, typename Out>
void write(const T* sum, const void* offset, int64_t d, void* out) {
  for_blocks<T, T>({sum, d, false},
                   [&](const Block<T>& x, int64_t first, int64_t count) LAMBDA_INLINE {
                     Block<T> block = x;
                     if (offset != nullptr) {
                       const Block<T> b = load_at<T, Out>({offset, d, false}, first, count);
                       for (int j = 0; j < kVectors; ++j) block.v[j] += b.v[j];
                     }
                     store_at<T, Out>(block, out, first, count);
                     return false;
                   });
}

}  // namespace
}  // namespace softtopk::cpu::SOFTTOPK_ISA
