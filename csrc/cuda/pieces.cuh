// What the kernels of sparse_gradients.cu have in common: their arguments, and the pieces in which
// the entries of a code are shared out.
#pragma once

#include "layout.cuh"

namespace softtopk::cuda {

inline constexpr int kPiece = 64;  // entries

struct GradientArgs {
  const void* scale;
  const int32_t* indices;
  const int32_t* offsets;
  const int32_t* entries;
  int64_t places;
  int32_t max_active, n;
  int32_t d;
  int32_t first_column, end_column;  // those that are gone through
  const void* y;
  const void* weight;  // or null
  bool project, zero_silent;
  bool given;  // the dots are there
  void* grad;
  void* dots;
  void* sums;
  void* squares;
  // The workspace.
  void* partial;       // (pieces, 2, d), where a piece begins or ends within a long latent
  void* partial_sums;  // (pieces, 2)
  int32_t* longs;      // (pieces,) the long latent that begins in a piece, or -1
  int64_t pieces;
};

// Whether pieces share a latent's entries.
__device__ __forceinline__ bool is_long(int32_t begin, int32_t end) { return end - begin > kPiece; }

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  return value;
}

}  // namespace softtopk::cuda
