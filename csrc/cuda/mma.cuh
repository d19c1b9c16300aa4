// Products of small matrices of bfloat16 on the tensor cores, by a warp.
//
// A lane has g = lane / 4 and t = lane % 4. A matrix of 8 x 8 elements of 16 bits is a register:
// the lane has row g, columns 2t and 2t + 1, the first in the low half.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace softtopk::cuda {

// D (16, 8) += A (16, 16) B (16, 8), in float32. A has four 8 x 8 matrices: its upper and lower
// rows of the left columns, then those of the right. Of B, whose columns are what rows are above,
// the lane has of column g rows 2t and 2t + 1, of the upper and the lower half. Of D it has columns
// 2t and 2t + 1 of row g, then of row g + 8.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The transpose of an 8 x 8 matrix.
__device__ __forceinline__ uint32_t transposed(uint32_t matrix) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

}  // namespace softtopk::cuda
