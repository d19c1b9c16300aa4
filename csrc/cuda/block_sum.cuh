// A sum over the threads of a block in float64, in an order that their number alone decides.
#pragma once

#include "row.cuh"

namespace softtopk::cuda {

struct Total {
  double value;
  __device__ void combine(const Total& other) { value += other.value; }
};

// By all THREADS of the block, once in a kernel; valid in the first warp.
template <int THREADS>
__device__ __forceinline__ double sum_of_block(double value) {
  constexpr int kWarps = THREADS / 32;
  __shared__ double of_warps[kWarps];
  const int thread = int(threadIdx.x);
  value = reduce_lanes<32>(Total{value}).value;
  if (thread % 32 == 0) of_warps[thread / 32] = value;
  __syncthreads();
  if (thread >= 32) return 0;
  return reduce_lanes<32>(Total{thread < kWarps ? of_warps[thread] : 0}).value;
}

}  // namespace softtopk::cuda
