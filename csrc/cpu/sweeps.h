// Sweeps over one row: everything here that touches all n elements, vectorised per instruction set.
//
// sweeps.cpp is compiled once for each instruction set into its own namespace; sweeps<T>(type) is
// the table that this processor can run. A sweep reads a row of that type, negates it if asked, and
// works in T (float or double) in registers and a stack buffer of one block.
// Sums run over blocks of fixed size in the order of the elements, whatever the row's address.
#pragma once

#include <cstdint>

#include "../laplace.h"
#include "../softtopk.h"

namespace softtopk::cpu {

struct Row {
  const void* data;
  int64_t n;
  bool negate;
};

template <typename T>
struct Range {
  T min, max;           // of the finite elements; +inf, -inf when there is none
  int64_t plus, minus;  // the number of +inf, -inf
  bool nan;
};

template <typename T>
struct Split {
  int64_t count;  // |{x >= c}|
  T r_A, r_B;     // min{x >= c} or +inf, max{x < c} or -inf
};

// How exp(-|x - r| / alpha) is formed: 2^((distance * s1) * s2), with r_A above and r_B below.
// Two factors, because log2(e) / alpha overflows where alpha is below 5e-39.
template <typename T>
struct Scale {
  T r_A, r_B;            // x >= r_A is above; an empty side has +inf, -inf
  T origin_A, origin_B;  // r_A, r_B, or a finite number for an empty side
  T s1, s2;
};

struct Tails {
  double P, Q;           // sums of exp(-|x - r| / alpha) over x >= r_A and over x <= r_B
  int64_t count, below;  // |{x >= r_A}|, |{x <= r_B}|
};

// What the two sweeps of the backward share.
template <typename T>
struct Pivot {
  T q_A, q_B;  // q = q_A e above, q_B e below
  T e_A, e_B;  // and 0 where e is less than these: arithmetic on denormal numbers is slow
  T s_A, s_B;  // h / alpha likewise, in units of s; as one number it may overflow
  T s;
  T x, v;  // the element of the largest q, and its incoming gradient
};

struct Means {
  double v, t;  // <q, v - v_pivot>, <q, t - t_pivot>; t in units of ln 2
};

// The output of the log domain: of h on the minor side, and of 1 - h on the major side.
template <typename T>
struct LogOutput {
  bool complement;  // log(1 - p), whose minor side is above; otherwise log p
  T log_h, h;       // log h = log_h + log e on the minor side, h = h e on the major side
  Steps<T> steps;
};

// What the two sweeps of the log domain's backward share.
template <typename T>
struct LogPivot {
  bool complement;
  T q_A, q_B;  // q = q_A e above, q_B e below
  T e_A, e_B;  // and 0 where e is less than these
  T h_A, h_B;  // h = h_A e, h_B e
  T x, u;      // the element of the largest q; its v / (1 - h) if it is on the major side, else 0
  T dominant;  // a q above this is that of the one element which outweighs all others
  Steps<T> steps;
};

struct LogMeans {
  double u, t;            // <q, u - u_pivot> over the major side; <q, t - t_pivot>, units of 2^64
  double rest_q, rest_v;  // sums without a dominant element: of q, and of v over the minor side
};

template <typename T>
struct LogMoments {
  T M, shift;           // <q, u> over the major side; u_pivot - M without its cancellation
  T V, rest_q, rest_v;  // the sum of v over the minor side
  T t;
};

struct Counts {
  int64_t above, equal;  // |{x > value}|, |{x == value}|
};

// How many elements of a row a sparse code would keep, and what those weigh that it does not hold.
struct Kept {
  int64_t count;
  double q, t;  // sums of q and of q (t - t_pivot), t in units of ln 2
};

constexpr int kGatherRoom = 16;
constexpr int kPlaces = 128;

template <typename T>
struct Sweeps {
  Range<T> (*range)(const Row& row);
  Split<T> (*split)(const Row& row, T c);
  Tails (*tails)(const Row& row, const Scale<T>& scale);
  // Copies the elements with lo < x < hi in order and returns their number, or some number above
  // `capacity` when they are more. `out` has room for capacity + kGatherRoom.
  int64_t (*gather)(const Row& row, T lo, T hi, T* out, int64_t capacity);
  T (*element)(const Row& row, int64_t i);
  // kPlaces elements at places that are spread evenly.
  void (*sample)(const Row& row, T* out);
  // The first i with x_i == value; -1 where there is none.
  int64_t (*find)(const Row& row, T value);

  // p = 1 - h_A e above, h_B e below, in the row's type.
  void (*probabilities)(const Row& row, const Scale<T>& scale, T h_A, T h_B, void* p);
  Means (*means)(const Row& row, const Row& v, const Scale<T>& scale, const Pivot<T>& pivot);
  // grad_x in the row's type; returns <q, (t - <q, t>)(v - <q, v>)>, t in units of ln 2.
  double (*gradient)(const Row& row, const Row& v, const Scale<T>& scale, const Pivot<T>& pivot,
                     const Means& means, void* grad_x);

  // log p or log(1 - p) in the row's type.
  void (*log_probabilities)(const Row& row, const Scale<T>& scale, const LogOutput<T>& form,
                            void* out);
  LogMeans (*log_means)(const Row& row, const Row& v, const Scale<T>& scale,
                        const LogPivot<T>& pivot);
  // grad_x in the row's type; returns sum g (t - <q, t>) before the sign, t in units of 2^64.
  double (*log_gradient)(const Row& row, const Row& v, const Scale<T>& scale,
                         const LogPivot<T>& pivot, const LogMoments<T>& moments, void* grad_x);

  Counts (*counts)(const Row& row, T value);
  // 1 where x > value and at the first `ties` elements equal to it, 0 elsewhere.
  void (*mask)(const Row& row, T value, int64_t ties, void* out);
  // The indices of the same elements, ascending.
  void (*indices)(const Row& row, T value, int64_t ties, int64_t* out);
  // `value` n times in the row's type.
  void (*fill)(const Row& row, T value, void* out);

  // The row's activations; returns whether one is NaN.
  bool (*activate)(const Row& row, const Activation& activation, T* out);
  // The elements above `value` and the first `ties` equal to it: the first `capacity` of them, in
  // order, and their indices. What is not among these is not weighed where there is no pivot.
  Kept (*keep)(const Row& row, T value, int64_t ties, const Scale<T>& scale, const Pivot<T>* pivot,
               int64_t capacity, int32_t* indices, T* elements);

  // For the rows x_i of a matrix with d columns of the type, i in `places`, one after the other:
  // sum += scales_i x_i and, where `along` (d,) is not null, dots_i = <along, x_i>.
  void (*accumulate)(const void* matrix, int64_t d, const int32_t* places, const T* scales,
                     int64_t count, const void* along, T* sum, T* dots);
  // sum -= part * along, where that is not null; returns |sum|^2.
  T (*finish)(const void* along, T part, int64_t d, T* sum);
  // sum, plus `offset` (d,) where that is not null, in the type.
  void (*write)(const T* sum, const void* offset, int64_t d, void* out);
};

// The table for rows of a type; T is double for float64, float for the others.
template <typename T>
const Sweeps<T>& sweeps(Type type);

}  // namespace softtopk::cpu
