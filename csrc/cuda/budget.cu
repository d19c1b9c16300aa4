// Budgets of k from scores, and the softplus of how far their mean is above a target: chains of
// small steps on (rows,) float32, each chain in one launch. Sums are made by one block, in an order
// that the number of rows alone decides.
#include "block_sum.cuh"
#include "launch.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kThreads = 256, kSumming = 1024;

struct BudgetArgs {
  const float *score, *shift;
  float scale, low, high;
  const float* g;
  int64_t rows;
  float *out, *of_shift;
};

__device__ __forceinline__ float sigmoid(float z) { return 1.f / (1.f + expf(-z)); }

__global__ void __launch_bounds__(kThreads) budget_forward_kernel(const BudgetArgs args) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + int(threadIdx.x);
  if (row >= args.rows) return;
  const float k = args.scale * sigmoid(args.score[row] + *args.shift);
  args.out[row] = k < args.low ? args.low : k > args.high ? args.high : k;  // NaN stays
}

// One block.
__global__ void __launch_bounds__(kSumming) budget_backward_kernel(const BudgetArgs args) {
  const float shift = *args.shift;
  double sum = 0;
  for (int64_t row = threadIdx.x; row < args.rows; row += kSumming) {
    const float s = sigmoid(args.score[row] + shift), k = args.scale * s;
    const bool within = k >= args.low && k <= args.high;
    const float gradient = within ? args.g[row] * args.scale * (s * (1 - s)) : 0.f;
    args.out[row] = gradient;
    sum += gradient;
  }
  sum = sum_of_block<kSumming>(sum);
  if (threadIdx.x == 0) *args.of_shift = float(sum);
}

struct ExcessArgs {
  const float* k;
  int64_t rows;
  const float* target;  // null: target_number
  double target_number, beta;
  float* out;  // the loss, and the gradient of it to each of k
};

// One block.
__global__ void __launch_bounds__(kSumming) budget_excess_kernel(const ExcessArgs args) {
  double sum = 0;
  for (int64_t row = threadIdx.x; row < args.rows; row += kSumming) sum += args.k[row];
  sum = sum_of_block<kSumming>(sum);
  if (threadIdx.x != 0) return;
  const double target = args.target != nullptr ? double(*args.target) : args.target_number;
  const double x = args.beta * (sum / double(args.rows) - target);
  args.out[0] = float(x > 20 ? x / args.beta : log1p(exp(x)) / args.beta);  // as in torch
  args.out[1] = float((x > 20 ? 1 : 1 / (1 + exp(-x))) / double(args.rows));
}

template <class Args>
void start(void (*kernel)(Args), Args args, int64_t blocks, int threads, void* stream) {
  void* pointers[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers, 0,
                         static_cast<cudaStream_t>(stream)),
        "kernel launch");
}

}  // namespace

void budget_forward(const float* score, const float* shift, double scale, double low, double high,
                    int64_t rows, float* k, int device, void* stream) {
  if (rows == 0) return;
  const DeviceGuard guard(device);
  const BudgetArgs args = {score, shift, float(scale), float(low), float(high), nullptr,
                           rows,  k,     nullptr};
  start(budget_forward_kernel, args, (rows + kThreads - 1) / kThreads, kThreads, stream);
}

void budget_backward(const float* score, const float* shift, double scale, double low, double high,
                     const float* g, int64_t rows, float* of_score, float* of_shift, int device,
                     void* stream) {
  const DeviceGuard guard(device);
  const BudgetArgs args = {score, shift, float(scale), float(low), float(high),
                           g,     rows,  of_score,     of_shift};
  start(budget_backward_kernel, args, 1, kSumming, stream);
}

void budget_excess(const float* k, int64_t rows, const float* target, double target_number,
                   double beta, float* out, int device, void* stream) {
  const DeviceGuard guard(device);
  const ExcessArgs args = {k, rows, target, target_number, beta, out};
  start(budget_excess_kernel, args, 1, kSumming, stream);
}

}  // namespace softtopk::cuda
