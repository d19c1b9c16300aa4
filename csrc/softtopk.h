// The native contract: every launcher's prototype on one page.
//
// The mathematics is in softtopk/backends/reference.py and csrc/laplace.h. Rows are read as
// x[row * stride + i]; outputs are contiguous. float32, float16 and bfloat16 compute in float,
// float64 in double: `solution` (rows, 5), grad_k and grad_alpha (rows,) are of that type.
// Launchers check nothing that Python has checked. Those of cuda:: run on the given device and
// stream, restore the current device, and throw std::runtime_error with the driver's words.
#pragma once

#include <cstdint>

namespace softtopk {

enum class Type : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

// What a forward writes, and what a backward differentiates: p, log p, log(1 - p). A forward of
// `none` writes the solution alone.
enum class Form : int { p = 0, log = 1, log_complement = 2, none = 3 };

// A batch of rows of n contiguous elements each. largest = false reads every value negated.
struct Rows {
  const void* data;
  Type type;
  int64_t rows;
  int64_t n;
  int64_t stride;  // in elements, from one row to the next; 0 for an expanded row
  bool largest;
};

// One value per row: data[row * stride] (float32 or float64), or `number` when data is null.
struct PerRow {
  const void* data;
  Type type;
  int64_t stride;
  double number;
};

namespace cpu {

// out (rows, n) in x's type; solution (rows, 5) = r_A, r_B, P, Q, D, not written where it is null.
void soft_topk_forward(const Rows& x, const PerRow& k, const PerRow& alpha, Form form, void* out,
                       void* solution, int threads);

// v[row * v_stride + i] in x's type; grad_x (rows, n) in x's type. form is not `none`.
void soft_topk_backward(const Rows& x, const void* solution, const PerRow& alpha, Form form,
                        const void* v, int64_t v_stride, void* grad_x, void* grad_k,
                        void* grad_alpha, int threads);

// mask (rows, n) of 0 and 1 in x's type; a NaN row is NaN.
void hard_topk_mask(const Rows& x, const PerRow& k, void* mask, int threads);

// indices (rows, max_k), ascending, then -1; values (rows, max_k) of those elements in x's type,
// then 0, not written where it is null; counts (rows,).
void hard_topk_indices(const Rows& x, const PerRow& k, int64_t max_k, int64_t* indices,
                       void* values, int64_t* counts, int threads);

}  // namespace cpu

namespace cuda {

// The solution may be null as above, but not in the log domain.
void soft_topk_forward(const Rows& x, const PerRow& k, const PerRow& alpha, Form form, void* out,
                       void* solution, int device, void* stream);

void soft_topk_backward(const Rows& x, const void* solution, const PerRow& alpha, Form form,
                        const void* v, int64_t v_stride, void* grad_x, void* grad_k,
                        void* grad_alpha, int device, void* stream);

void hard_topk_mask(const Rows& x, const PerRow& k, void* mask, int device, void* stream);

void hard_topk_indices(const Rows& x, const PerRow& k, int64_t max_k, int64_t* indices,
                       void* values, int64_t* counts, int device, void* stream);

}  // namespace cuda

}  // namespace softtopk
