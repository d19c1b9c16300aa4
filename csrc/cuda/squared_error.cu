// mean_b |x_b - y_b|^2 and its gradient to y: a pass over both each way, nothing of their size
// kept.
//
// Threads sum in float32, a few elements each, blocks in float64; the blocks' sums are added up by
// a launch of its own, in an order that the sizes alone decide.
#include "block_sum.cuh"
#include "launch.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kThreads = 256, kItems = 4, kWidth = 4;
constexpr int64_t kStretch = int64_t(kThreads) * kItems * kWidth;  // elements of a block

template <class S>
struct alignas(kWidth * sizeof(S)) Four {
  typename Element<S>::Raw raw[kWidth];
};

struct ErrorArgs {
  const float* x;
  const void* y;
  int64_t size;
  double* sums;    // forward
  const float* g;  // backward: of the mean
  float scale;     // 2 / rows
  void* gradient;
};

// A thread's vectors of a stretch; the elements behind the last whole vector are the first block's.
template <class S, bool BACKWARD>
__global__ void __launch_bounds__(kThreads) error_kernel(const ErrorArgs args) {
  const int64_t places = args.size / kWidth;
  const int64_t first = int64_t(blockIdx.x) * (kThreads * kItems) + int(threadIdx.x);
  const float factor = BACKWARD ? *args.g * args.scale : 0.f;
  float sum = 0;
  Four<float> x[kItems];
  Four<S> y[kItems];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t i = first + item * kThreads;
    if (i >= places) continue;
    x[item] = reinterpret_cast<const Four<float>*>(args.x)[i];
    y[item] = static_cast<const Four<S>*>(args.y)[i];
  }
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t i = first + item * kThreads;
    if (i >= places) continue;
    Four<S> gradient;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float difference =
          Element<S>::value(y[item].raw[e]) - Element<float>::value(x[item].raw[e]);
      if constexpr (BACKWARD) {
        gradient.raw[e] = Element<S>::raw(factor * difference);
      } else {
        sum += difference * difference;
      }
    }
    if constexpr (BACKWARD) static_cast<Four<S>*>(args.gradient)[i] = gradient;
  }
  const int64_t rest = places * kWidth + int(threadIdx.x);
  if (blockIdx.x == 0 && rest < args.size) {
    using Raw = typename Element<S>::Raw;
    const float difference =
        Element<S>::value(static_cast<const Raw*>(args.y)[rest]) - args.x[rest];
    if constexpr (BACKWARD) {
      static_cast<Raw*>(args.gradient)[rest] = Element<S>::raw(factor * difference);
    } else {
      sum += difference * difference;
    }
  }
  if constexpr (!BACKWARD) {
    const double total = sum_of_block<kThreads>(double(sum));
    if (threadIdx.x == 0) args.sums[blockIdx.x] = total;
  }
}

constexpr int kSumming = 1024;

// One block.
__global__ void __launch_bounds__(kSumming)
    mean_kernel(const double* sums, int64_t count, double rows, float* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumming) sum += sums[i];
  const double total = sum_of_block<kSumming>(sum);
  if (threadIdx.x == 0) *out = float(total / rows);
}

template <class Kernel, class... Args>
void start(Kernel kernel, int64_t blocks, int threads, void* stream, Args... args) {
  void* pointers[] = {&args...};
  check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers, 0,
                         static_cast<cudaStream_t>(stream)),
        "kernel launch");
}

template <bool BACKWARD>
void run(const ErrorArgs& args, Type type, void* stream) {
  const int64_t blocks = squared_error_blocks(args.size);
  switch (type) {
    case Type::bfloat16:
      return start(error_kernel<__nv_bfloat16, BACKWARD>, blocks, kThreads, stream, args);
    case Type::float16:
      return start(error_kernel<__half, BACKWARD>, blocks, kThreads, stream, args);
    default:
      return start(error_kernel<float, BACKWARD>, blocks, kThreads, stream, args);
  }
}

}  // namespace

int64_t squared_error_blocks(int64_t size) {
  return std::max<int64_t>((size + kStretch - 1) / kStretch, 1);
}

void squared_error_forward(const float* x, const void* y, Type type, int64_t rows, int64_t d,
                           double* sums, float* out, int device, void* stream) {
  const DeviceGuard guard(device);
  run<false>({x, y, rows * d, sums, nullptr, 0, nullptr}, type, stream);
  start(mean_kernel, 1, kSumming, stream, static_cast<const double*>(sums),
        squared_error_blocks(rows * d), double(rows), out);
}

void squared_error_backward(const float* x, const void* y, Type type, int64_t rows, int64_t d,
                            const float* g, void* gradient, int device, void* stream) {
  const DeviceGuard guard(device);
  run<true>({x, y, rows * d, nullptr, g, float(2 / double(rows)), gradient}, type, stream);
}

}  // namespace softtopk::cuda
