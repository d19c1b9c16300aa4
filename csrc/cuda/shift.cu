// (x - shift) / scale of rows (rows, d), in one pass and rounded to the dtype that is wanted.
//
// A thread has some columns of a few rows, whose loads are all in flight before one is used.
#include "launch.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kThreads = 128, kRows = 8;

template <class S, int WIDTH>
struct alignas(WIDTH * sizeof(S)) Few {
  typename Element<S>::Raw raw[WIDTH];
};

struct ShiftArgs {
  const void* x;
  const float *shift, *scale;  // scale: or null
  int64_t rows, d;
  int64_t across;  // blocks that share the columns
  void* out;
};

template <class S, class OUT, int WIDTH>
__global__ void __launch_bounds__(kThreads) shift_kernel(const ShiftArgs args) {
  const int64_t places = args.d / WIDTH;
  const int64_t column = blockIdx.x % args.across * kThreads + int(threadIdx.x);
  if (column >= places) return;
  const int64_t first = blockIdx.x / args.across * kRows;
  Few<S, WIDTH> x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= args.rows) continue;
    x[r] = static_cast<const Few<S, WIDTH>*>(args.x)[(first + r) * places + column];
  }
  float shift[WIDTH], scale[WIDTH];
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) {
    shift[e] = args.shift[column * WIDTH + e];
    scale[e] = args.scale != nullptr ? args.scale[column * WIDTH + e] : 1.f;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= args.rows) continue;
    Few<OUT, WIDTH> out;
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      const float difference = Element<S>::value(x[r].raw[e]) - shift[e];
      out.raw[e] = Element<OUT>::raw(args.scale != nullptr ? difference / scale[e] : difference);
    }
    static_cast<Few<OUT, WIDTH>*>(args.out)[(first + r) * places + column] = out;
  }
}

template <class F>
void with_short_type(Type type, F f) {
  if (type == Type::bfloat16) return f(Tag<__nv_bfloat16>());
  if (type == Type::float16) return f(Tag<__half>());
  f(Tag<float>());
}

}  // namespace

void shift_rows(const void* x, Type type, int64_t rows, int64_t d, const float* shift,
                const float* scale, void* out, Type out_type, int device, void* stream) {
  if (rows == 0 || d == 0) return;
  const DeviceGuard guard(device);
  const auto by_four = [](const void* data, Type of) {
    return reinterpret_cast<uintptr_t>(data) % (of == Type::float32 ? 16 : 8) == 0;
  };
  const bool wide = d % 4 == 0 && by_four(x, type) && by_four(out, out_type);
  const int64_t across = (d / (wide ? 4 : 1) + kThreads - 1) / kThreads;
  ShiftArgs args = {x, shift, scale, rows, d, across, out};
  with_short_type(type, [&](auto tag) {
    with_short_type(out_type, [&](auto out_tag) {
      using S = typename decltype(tag)::type;
      using Out = typename decltype(out_tag)::type;
      const auto kernel = wide ? shift_kernel<S, Out, 4> : shift_kernel<S, Out, 1>;
      void* pointers[] = {&args};
      check(cudaLaunchKernel(kernel, dim3(unsigned(across * ((rows + kRows - 1) / kRows))),
                             dim3(kThreads), pointers, 0, static_cast<cudaStream_t>(stream)),
            "kernel launch");
    });
  });
}

}  // namespace softtopk::cuda
