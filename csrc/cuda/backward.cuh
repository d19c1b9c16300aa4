// What the backward kernels, that of p and that of the log domain, share.
//
// Bytes: x and v are read once and grad_x written once where both rows fit in registers or shared
// memory; longer rows are read three times.
// Layout: a warp or a block to a row (row.cuh). Three sweeps: the pivot, the means, the covariance
// together with grad_x.
#pragma once

#include "launch.cuh"
#include "row.cuh"
#include "threshold.cuh"

namespace softtopk::cuda {

struct BackwardArgs {
  Rows x;
  const void* solution;
  PerRow alpha;
  Form form;
  const void* v;
  int64_t v_stride;
  void* grad_x;
  void* grad_k;
  void* grad_alpha;
  bool wide_x, wide_v, wide_grad;
  bool fed;  // of backward_resident: by the copy engine
  int64_t first_row;
};

struct First {
  int32_t index;
  __device__ void combine(const First& other) { index = other.index < index ? other.index : index; }
};

template <class T>
struct Total {
  T value;
  __device__ void combine(const Total& other) { value += other.value; }
};

// The first i with chosen(x_i) in all of the group's threads; 0 where there is none.
template <class S, class Row, class Group, class F>
__device__ __forceinline__ int32_t first_place(const Row& row, Group& group, int32_t n, F chosen) {
  constexpr int kSize = Chunk<S>::size;
  First first = {0x7fffffff};
  row.for_each([&](int32_t item) {
    Compute<S> x[kSize];
    row.chunk(item).read(x);
#pragma unroll
    for (int i = kSize - 1; i >= 0; --i) {
      const int32_t index = chunk_index<Group>(item) * kSize + i;
      if (index < first.index && chosen(x[i])) first.index = index;
    }
  });
  first = group.reduce(first);
  return first.index < n ? first.index : 0;
}

// Launches kernel_of(Tag<S>(), layout) over all rows, unless other(args, Tag<S>()) has done it; the
// flags of args are set here. RESIDENT: rows that fit on chip are the other's.
template <bool RESIDENT, class Other, class F>
void launch_backward(BackwardArgs args, int device, void* stream, Other other, F kernel_of) {
  const Rows& x = args.x;
  check_length(x.n);
  const DeviceGuard guard(device);
  with_type(x.type, [&](auto tag) {
    constexpr int64_t size = sizeof(typename decltype(tag)::type);
    args.wide_x = is_wide(x.data, x.rows, x.stride, size);
    args.wide_v = is_wide(args.v, x.rows, args.v_stride, size);
    args.wide_grad = is_wide(args.grad_x, x.rows, x.n, size);
    if (other(args, tag)) return;
    with_layout<2, !RESIDENT || size == 8>(
        x.n, size, device_at(device).shared_limit, [&](auto layout, int64_t shared) {
          launch<decltype(layout)>(kernel_of(tag, layout), args, x.rows, shared, stream);
        });
  });
}

// The backward of form log or log_complement (log_backward.cu).
void log_backward(const BackwardArgs& args, int device, void* stream);

}  // namespace softtopk::cuda
