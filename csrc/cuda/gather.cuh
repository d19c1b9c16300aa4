// Sums of scaled rows on tensor cores, for bfloat16: what decoding and the weights' gradients
// share.
//
// With g = lane / 4 and t = lane % 4, a lane loads 16 bytes, columns 8g to 8g + 7 of a chunk of 64,
// of entries 2t, 2t + 1, 2t + 8 and 2t + 9 of sixteen: eight lanes read 128 bytes of a row. Words
// of two entries, woven, are what multiply_add() takes for a matrix of columns by entries (Turned);
// its product with the entries' scales, one column to a sum, has the sums. A scale is the sum of
// two bfloat16, of columns 2s and 2s + 1 of the product for sum s, which are added up in the end:
// 17 bits of it count, and 25 with the third that a sum in float32 has from another product. No
// element is converted, and no sum is taken across lanes.
#pragma once

#include "layout.cuh"
#include "mma.cuh"

namespace softtopk::cuda {

// A row of zeros for where there is no entry.
static __device__ uint4 zeros[64];
__device__ __forceinline__ const unsigned char* nowhere() {
  return reinterpret_cast<const unsigned char*>(zeros);
}

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// The bits of the parts of a scale.
__device__ __forceinline__ void split(float scale, uint32_t (&parts)[3]) {
  using E = Element<__nv_bfloat16>;
#pragma unroll
  for (uint32_t& part : parts) {
    const uint16_t raw = E::raw(scale);
    scale -= E::value(raw);
    part = raw;
  }
}

// Columns 8g + 2m of all g, and then 8g + 2m + 1, by the sixteen entries.
struct Turned {
  uint32_t words[4];

  __device__ __forceinline__ Turned(const uint4 (&x)[4], int m) {
    words[0] = __byte_perm(word_of(x[0], m), word_of(x[1], m), 0x5410);
    words[1] = __byte_perm(word_of(x[0], m), word_of(x[1], m), 0x7632);
    words[2] = __byte_perm(word_of(x[2], m), word_of(x[3], m), 0x5410);
    words[3] = __byte_perm(word_of(x[2], m), word_of(x[3], m), 0x7632);
  }
};

// Of the products of a chunk, the sums t in columns 8g to 8g + 7.
__device__ __forceinline__ void sums_of(const float (&products)[4][4], float (&x)[8]) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    x[2 * m] = products[m][0] + products[m][1];
    x[2 * m + 1] = products[m][2] + products[m][3];
  }
}

template <class O>
__device__ __forceinline__ void store_8(O* to, const float (&x)[8]) {
  constexpr int kSize = Chunk<O>::size;
#pragma unroll
  for (int part = 0; part < 8 / kSize; ++part) {
    float own[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) own[i] = x[part * kSize + i];
    store_global(to + part * kSize, Chunk<O>::of(own).words);
  }
}

}  // namespace softtopk::cuda
