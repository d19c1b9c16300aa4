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

// What becomes of the pre-activations z of a row before the selection: z + bias, rounded to its
// type, where that is above the threshold, else 0.
struct Activation {
  const void* bias;         // (n,) in z's type, or null
  const float* thresholds;  // (n,) or null
  double threshold;         // >= 0, where thresholds is null
};

// What a code's entries are worth: activation times p; activation where the hard mask is 1; that,
// with no other entries.
enum class Selecting : int { soft = 0, straight_through = 1, hard = 2 };

// A sparse code (softtopk/sparse.py): values, active (rows, max_active) and state (rows, 7) of the
// compute type, indices (rows, max_active), counts (rows,). There is no state of a hard selection.
struct Code {
  void* values;
  int32_t* indices;
  void* active;
  int32_t* counts;
  void* state;
  int64_t max_active;
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

// The code of every row of pre-activations z; z.largest is not read.
int64_t select_workspace(int64_t rows, int64_t n, Type type);  // bytes
void code_forward(const Rows& z, const PerRow& k, const PerRow& alpha, const Activation& activation,
                  Selecting mode, const Code& code, void* workspace, int threads);

// From g, the gradient of a code's values: grad_active (rows, max_active), grad_k and grad_alpha
// (rows,), all of the type `compute`. `values` is null but where the selection was
// straight-through.
void code_backward(Type compute, int64_t rows, int64_t max_active, const void* active,
                   const void* values, const int32_t* counts, const void* state,
                   const PerRow& alpha, const void* g, double selection_gradient, void* grad_active,
                   void* grad_k, void* grad_alpha, int threads);

// The entries of a code by latent: offsets (n + 1,), and in entries (rows * max_active,) the places
// row * max_active + j of latent l from offsets[l] to offsets[l + 1], ascending.
int64_t transpose_workspace(int64_t rows, int64_t max_active, int64_t n);  // bytes
void transpose(const int32_t* indices, const int32_t* counts, int64_t rows, int64_t max_active,
               int64_t n, int32_t* offsets, int32_t* entries, void* workspace, int threads);

// out (rows, d) = sum_j values_j weight[indices_j] + bias; weight (n, d), bias (d,) or null and out
// of one type, values of its compute type.
void decode(const void* values, const int32_t* indices, const int32_t* counts, int64_t rows,
            int64_t max_active, const void* weight, Type type, int64_t n, int64_t d,
            const void* bias, void* out, int threads);

// For every latent l with its entries e, in their order, of a code with these indices: grad[l] =
// sum_e scale_e y[row of e] (n, d) of out_type; with a weight (n, d), dots_e = <weight[l], y[row of
// e]> (rows, max_active), 0 in unused places, and with `project` grad[l] without its part along
// weight[l], which has unit norm; where not null, sums[l] = sum_e scale_e and squares[l] =
// |grad[l]|^2. A latent without entries has grad[l] = 0, or without `zero_silent` its place in grad
// is left alone. y (rows, d) and weight are of `type`; scale, dots, sums and squares of its compute
// type.
int64_t gradients_workspace(Type type, int64_t rows, int64_t max_active, int64_t n, int64_t d,
                            bool dots, bool squares);  // bytes
void latent_gradients(const void* scale, const int32_t* indices, const int32_t* offsets,
                      const int32_t* entries, int64_t rows, int64_t max_active, int64_t n,
                      int64_t d, const void* y, const void* weight, Type type, Type out_type,
                      bool project, bool zero_silent, void* grad, void* dots, void* sums,
                      void* squares, void* workspace, int threads);

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

// The code of every row of pre-activations z; z.largest is not read.
int64_t select_workspace(int64_t rows, int64_t n, Type type);  // bytes
void code_forward(const Rows& z, const PerRow& k, const PerRow& alpha, const Activation& activation,
                  Selecting mode, const Code& code, void* workspace, int device, void* stream);

// From g, the gradient of a code's values: grad_active (rows, max_active), grad_k and grad_alpha
// (rows,), all of the type `compute`. `values` is null but where the selection was
// straight-through.
void code_backward(Type compute, int64_t rows, int64_t max_active, const void* active,
                   const void* values, const int32_t* counts, const void* state,
                   const PerRow& alpha, const void* g, double selection_gradient, void* grad_active,
                   void* grad_k, void* grad_alpha, int device, void* stream);

// The entries of a code by latent: offsets (n + 1,), and in entries (rows * max_active,) the places
// row * max_active + j of latent l from offsets[l] to offsets[l + 1], ascending.
int64_t transpose_workspace(int64_t rows, int64_t max_active, int64_t n);  // bytes
void transpose(const int32_t* indices, const int32_t* counts, int64_t rows, int64_t max_active,
               int64_t n, int32_t* offsets, int32_t* entries, void* workspace, int device,
               void* stream);

// out (rows, d) = sum_j values_j weight[indices_j] + bias; weight (n, d), bias (d,) or null and out
// of one type, values of its compute type.
void decode(const void* values, const int32_t* indices, const int32_t* counts, int64_t rows,
            int64_t max_active, const void* weight, Type type, int64_t n, int64_t d,
            const void* bias, void* out, int device, void* stream);

// For every latent l with its entries e, in their order, of a code with these indices: grad[l] =
// sum_e scale_e y[row of e] (n, d) of out_type; with a weight (n, d), dots_e = <weight[l], y[row of
// e]> (rows, max_active), 0 in unused places, and with `project` grad[l] without its part along
// weight[l], which has unit norm; where not null, sums[l] = sum_e scale_e and squares[l] =
// |grad[l]|^2. A latent without entries has grad[l] = 0, or without `zero_silent` its place in grad
// is left alone. y (rows, d) and weight are of `type`; scale, dots, sums and squares of its compute
// type.
int64_t gradients_workspace(Type type, int64_t rows, int64_t max_active, int64_t n, int64_t d,
                            bool dots, bool squares);  // bytes
void latent_gradients(const void* scale, const int32_t* indices, const int32_t* offsets,
                      const int32_t* entries, int64_t rows, int64_t max_active, int64_t n,
                      int64_t d, const void* y, const void* weight, Type type, Type out_type,
                      bool project, bool zero_silent, void* grad, void* dots, void* sums,
                      void* squares, void* workspace, int device, void* stream);

// What follows is for steps of training: on the CPU torch does as well.

// The columns of relu(x W^T + c) . w2 in chunks.

// From z = x W^T + c, a chunk (rows, columns) whose rows start on 16 bytes: its part of the scores
// (rows,), added to what is there or with `add` false put there, and mask[row * mask_stride + j /
// 8] with bit j % 8 set where z > 0. w2 (columns,) and scores are of the compute type.
void relu_dot(const void* z, Type type, int64_t rows, int64_t columns, int64_t stride,
              const void* w2, bool add, void* scores, uint8_t* mask, int64_t mask_stride,
              int device, void* stream);

// The other way: g_b rounded to the type where the mask is set, 0 elsewhere, rows on 16 bytes; and
// sums (parts, columns), whose total over the parts is gamma_j = sum_b g_b mask_bj, with g (rows,)
// of the compute type.
int64_t expand_mask_parts(int64_t rows);
void expand_mask(const uint8_t* mask, int64_t mask_stride, int64_t rows, int64_t columns, Type type,
                 const void* g, void* expanded, int64_t stride, void* sums, int device,
                 void* stream);

// From the products G (columns, d), of the compute type, the gradients w2_j G_j (of `type` or its
// compute type; it may be G itself), w2_j gamma_j and <weight_j, G_j> + bias_j gamma_j of a chunk;
// and, where it is not null, squares[j] = |w2_j G_j|^2.
void scale_gradient(const void* products, const void* weight, Type type, const void* bias,
                    const void* w2, const void* sums, int64_t sums_stride, int64_t parts,
                    int64_t columns, int64_t d, void* grad_weight, Type out_type, void* grad_bias,
                    void* grad_w2, void* squares, int device, void* stream);

// One step of Adam on parameters and their copies in bfloat16 (or null), as softtopk/optim.py has
// it. On the device: lr (null: lr_number), the number of this step, the factor of the gradient
// (null: 1), and found_inf (null: 0), which leaves everything as it is when it is not 0.
struct FlatParameter {
  float* parameter;
  const float* gradient;
  float *exp_avg, *exp_avg_sq;
  void* copy;
  int64_t size;
  const float* lr;
  double lr_number, beta1, beta2, eps;
  const float *step, *scale;
};
void adam_flat(const FlatParameter* parameters, int64_t count, const float* found_inf, int device,
               void* stream);

// The same by rows (rows, d): with offsets (rows + 1,) those with equal neighbours are left alone;
// `normalize` scales them to unit norm.
void adam_rows(float* parameter, const float* gradient, float* exp_avg, float* exp_avg_sq,
               void* copy, int64_t rows, int64_t d, const float* lr, double lr_number, double beta1,
               double beta2, double eps, const float* step, const float* scale,
               const float* found_inf, const int32_t* offsets, bool normalize, int device,
               void* stream);

// The factors and norms of a gradient clip, out (2, groups), as softtopk/optim.py has it, of parts
// in the order of their groups: gradients, or what has been squared already. sums: as many as the
// blocks of all parts.
struct ClipPart {
  const float* data;
  int64_t size, squared, group;
};
int64_t clip_blocks(int64_t size);
void clip_factors(const ClipPart* parts, int64_t count, const double* max_norms, int64_t groups,
                  double* sums, float* out, int device, void* stream);

// Budgets k = clamp(scale * sigmoid(score + shift), low, high) of scores (rows,), the gradients
// from those of k, and out (2,): softplus_beta(mean k - target) and the gradient of it to each of
// k. On the device: shift, and the target (null: target_number).
void budget_forward(const float* score, const float* shift, double scale, double low, double high,
                    int64_t rows, float* k, int device, void* stream);
void budget_backward(const float* score, const float* shift, double scale, double low, double high,
                     const float* g, int64_t rows, float* of_score, float* of_shift, int device,
                     void* stream);
void budget_excess(const float* k, int64_t rows, const float* target, double target_number,
                   double beta, float* out, int device, void* stream);

// found, 3 int64 and n bytes: of latents (rows, n) the number that is not 0, the same again, the
// most in a row, and for each latent whether it is not 0 in some row; of a code the number of
// values that are not 0, the entries, the most entries of a row, and the same of its values. n is
// at most most_latents().
int64_t most_latents();
void latents_activity(const void* latents, Type type, int64_t rows, int64_t n, void* found,
                      int device, void* stream);
void codes_activity(const void* values, Type type, const int32_t* indices, const int32_t* counts,
                    int64_t rows, int64_t max_active, int64_t n, void* found, int device,
                    void* stream);

// Of `size` activations and gates on 16 bytes a * p, where p of at most `cut` counts as 0; and from
// the gradient of that g * p, likewise and with `rectified` 0 where a is, and g * a if of_p is not
// null.
void gate_forward(const void* a, const void* p, Type type, double cut, int64_t size, void* out,
                  int device, void* stream);
void gate_backward(const void* a, const void* p, const void* g, Type type, double cut,
                   bool rectified, int64_t size, void* of_a, void* of_p, int device, void* stream);

// mean_b |x_b - y_b|^2 of x and y (rows, d) on 16 bytes, y of any type but float64, and from the
// gradient g of it that to y. sums: as many as there are blocks.
int64_t squared_error_blocks(int64_t size);
void squared_error_forward(const float* x, const void* y, Type type, int64_t rows, int64_t d,
                           double* sums, float* out, int device, void* stream);
void squared_error_backward(const float* x, const void* y, Type type, int64_t rows, int64_t d,
                            const float* g, void* gradient, int device, void* stream);

// (x - shift) / scale of rows (rows, d), rounded to out_type; scale may be null. No float64.
void shift_rows(const void* x, Type type, int64_t rows, int64_t d, const float* shift,
                const float* scale, void* out, Type out_type, int device, void* stream);

}  // namespace cuda

}  // namespace softtopk
