// Rows that start anywhere: moved into place on chip, and written from there.
//
// The copy engine brings whole granules of 16 bytes, so that a row lies `skip` bytes after the
// place of its first chunk. It is moved there once, and from then on read like any other, by 16
// bytes at a time; what is written of it goes by way of its place on chip. Both ways there are two
// manners: by words, a warp its own part, neighbouring lanes neighbouring words; or by 16 bytes,
// which a thread takes from two chunks. Of the floor (H200; float32 | bfloat16; forward at n = 4095
// and 50257, alpha = 0.01, then backward; of aligned rows of 4096 and 65536 0.87, 0.75, 0.93, 0.87
// | 0.72, 0.77, 0.87, 0.84):
//
//   0.73 0.52 0.85 0.60 | 0.44 0.38 0.49 0.39  read and written by elements where they came
//   0.82 0.65 0.85 0.77 | 0.55 0.62 0.60 0.66  moved once, by words
//   0.80 0.61 0.86 0.73 | 0.59 0.64 0.63 0.69  moved once, by 16 bytes
//   0.81 0.64 0.85 0.76 | 0.55 0.64 0.60 0.68  moved by words, written by 16 bytes
//   0.81 0.61 0.86 0.74 | 0.55 0.62 0.64 0.67  moved by 16 bytes, written by words
//
// So 32-bit rows are moved by words, whose halves 16-bit rows would have to put together, and those
// by 16 bytes. What did not help: zeros written by 16 bytes and the rest by words (0.74 for 0.80 at
// n = 4095: more addresses than stores); a second row moved only where few of its chunks are read.
#pragma once

#include "layout.cuh"

namespace softtopk::cuda {

// Of the words of two chunks, one after the other, those from the WORDS-th on; of 16-bit elements
// from `bits` later on, 0 or 16.
template <class S, int WORDS>
__device__ __forceinline__ uint4 from_two(const uint4& a, const uint4& b, uint32_t bits) {
  const uint32_t words[9] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, 0};
  uint32_t from[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    from[i] = words[i + WORDS];
    if (sizeof(S) == 2) from[i] = __funnelshift_r(from[i], words[i + WORDS + 1], bits);
  }
  return {from[0], from[1], from[2], from[3]};
}

// Moves a row in `slot` down by `skip` bytes, 1 to 15, by all threads; each may then read what its
// warp owns. TOGETHER items are on their way at a time.
template <class H, int TOGETHER>
struct Mover {
  using S = typename H::S;

  __device__ __forceinline__ static void move(unsigned char* slot, int items, int skip) {
    if constexpr (sizeof(S) == 4) {
      by_words(reinterpret_cast<uint32_t*>(slot), items, skip / 4);
    } else {
      unsigned char* const own = slot + anew(int(threadIdx.x)) * 16;
      switch (skip / 4) {
        case 0:
          return by_chunks<0>(own, items, skip);
        case 1:
          return by_chunks<1>(own, items, skip);
        case 2:
          return by_chunks<2>(own, items, skip);
        default:
          return by_chunks<3>(own, items, skip);
      }
    }
  }

 private:
  // What follows a warp's part of a piece is another warp's to move, and so taken before anything
  // is moved: the first words after items lane / 4 * 4 + j, one a lane.
  __device__ __forceinline__ static void by_words(uint32_t* slot, int items, int skip) {
    constexpr int kStride = H::stride / 4;
    constexpr bool kAlone = H::threads == 32;  // then what follows is the next item
    const int t = anew(int(threadIdx.x)), lane = t % 32, from = lane + skip;
    uint32_t* const own = slot + t / 32 * 128 + lane;
    uint32_t after[4];
    if constexpr (!kAlone) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int item = lane / 4 * 4 + j;
        after[j] = item < items ? own[item * kStride + 128 - lane + lane % 4] : 0;
      }
      H::sync();
    }
#pragma unroll 1
    for (int first = 0; first < items; first += 4) {
#pragma unroll
      for (int group = 0; group < 4; group += TOGETHER) {
        uint32_t* const to = own + (first + group) * kStride;
        uint32_t words[TOGETHER][4];
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
          if (first + group + j >= items) break;
          const uint32_t* const words_from = to + j * kStride + skip;
#pragma unroll
          for (int i = 0; i < 3; ++i) words[j][i] = words_from[i * 32];
          if constexpr (kAlone) {
            words[j][3] = words_from[96];
          } else {  // the last ones are beyond the warp's part
            const uint32_t beyond = __shfl_sync(~0u, after[group + j], first + from % 4);
            words[j][3] = from < 32 ? words_from[96] : beyond;
          }
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
          if (first + group + j >= items) break;
#pragma unroll
          for (int i = 0; i < 4; ++i) to[j * kStride + i * 32] = words[j][i];
        }
        __syncwarp();
      }
    }
  }
  // First all threads read, then all write.
  template <int WORDS>
  __device__ __forceinline__ static void by_chunks(unsigned char* own, int items, int skip) {
    const uint32_t bits = uint32_t(skip & 3) * 8;
#pragma unroll 1
    for (int first = 0; first < items; first += TOGETHER, own += TOGETHER * H::stride) {
      uint4 moved[TOGETHER];
#pragma unroll
      for (int j = 0; j < TOGETHER; ++j) {
        if (first + j >= items) break;
        const uint4* const from = reinterpret_cast<const uint4*>(own + j * H::stride);
        moved[j] = from_two<S, WORDS>(from[0], from[1], bits);
      }
      H::sync();
#pragma unroll
      for (int j = 0; j < TOGETHER; ++j) {
        if (first + j >= items) break;
        *reinterpret_cast<uint4*>(own + j * H::stride) = moved[j];
      }
    }
    __syncwarp();
  }
};

// Writes a row from its place in `slot` to `row`, by all threads; each has written its own chunks
// there. Nothing may be written there before another barrier.
template <class H>
struct Writer {
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  static constexpr int kSize = Chunk<S>::size;

  __device__ __forceinline__ static void write(const unsigned char* slot, int items, Raw* row,
                                               const Mapping<H>& map) {
    if constexpr (sizeof(S) == 4) {
      __syncwarp();
      by_words(slot, row, map);
    } else {
      H::sync();
      const int off = int(reinterpret_cast<uintptr_t>(row) % 16);
      switch ((16 - off) / 4) {
        case 0:
          by_chunks<0>(slot, items, row, map, off);
          break;
        case 1:
          by_chunks<1>(slot, items, row, map, off);
          break;
        case 2:
          by_chunks<2>(slot, items, row, map, off);
          break;
        case 3:
          by_chunks<3>(slot, items, row, map, off);
          break;
        default:
          by_chunks<4>(slot, items, row, map, off);
      }
      write_ends(slot, items, row, map, off);
    }
  }

 private:
  __device__ __forceinline__ static void by_words(const unsigned char* slot, Raw* row,
                                                  const Mapping<H>& map) {
    constexpr int kPart = 32 * kSize;  // elements of a piece that a warp owns
    const int t = anew(int(threadIdx.x)), lane = t % 32, part = t / 32 * kPart;
    const int32_t first = map.piece(0) + part, step = map.piece(1) - map.piece(0);
    const Raw* from = reinterpret_cast<const Raw*>(slot) + part + lane;
    Raw* to = row + first + lane;
    int32_t left = map.n - first;
#pragma unroll 1
    for (; left >= kPart; left -= step) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) to[i * 32] = from[i * 32];
      from += H::stride / int(sizeof(Raw));
      to += step;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i * 32 + lane < left) to[i * 32] = from[i * 32];
    }
  }
  // Whole 16 bytes of memory, where the row starts `off` bytes after the first: in each those that
  // are from the WORDS-th word on in a chunk and the one before it. Chunks lie next to each other,
  // in a block alone anywhere, in a cluster within a piece.
  template <int WORDS>
  __device__ __forceinline__ static void by_chunks(const unsigned char* slot, int items, Raw* row,
                                                   const Mapping<H>& map, int off) {
    const int t = anew(int(threadIdx.x));
    const uint32_t bits = uint32_t(off & 3) * 8;
    const int32_t first = map.piece(0) * int32_t(sizeof(S)) + t * 16 - off,  // in bytes
        step = (map.piece(1) - map.piece(0)) * int32_t(sizeof(S));
    int32_t left = map.n * int32_t(sizeof(S)) - 16 - first;
    const unsigned char* from = slot + t * 16;
    unsigned char* to = reinterpret_cast<unsigned char*>(row) + first;
    bool inner = t > 0 || off == 0;
#pragma unroll 2
    for (int item = 0; item < items; ++item) {
      if (inner && left >= 0) {
        const uint4* const chunks = reinterpret_cast<const uint4*>(from);
        store_global(to, from_two<S, WORDS>(WORDS < 4 ? chunks[-1] : uint4{}, chunks[0], bits));
      }
      inner = inner || !C::many;
      from += H::stride;
      to += step;
      left -= step;
    }
  }
  // The elements that share their 16 bytes of memory with others.
  __device__ __forceinline__ static void write_ends(const unsigned char* slot, int items, Raw* row,
                                                    const Mapping<H>& map, int off) {
    const int t = anew(int(threadIdx.x));
    if constexpr (C::many) {
      for (int item = t / 32; item < items; item += H::threads / 32) {
        const int32_t piece = map.piece(item);
        write_ends_of_run(reinterpret_cast<const Raw*>(slot + item * H::stride), row + piece,
                          min(map.n - piece, Mapping<H>::piece_elements()), off, t % 32);
      }
    } else if (t < 32) {
      write_ends_of_run(reinterpret_cast<const Raw*>(slot), row, map.n, off, t);
    }
  }
  // Of `size` elements, less than 1 beyond the row's end, that lie next to each other; by a warp.
  __device__ __forceinline__ static void write_ends_of_run(const Raw* from, Raw* to, int32_t size,
                                                           int off, int lane) {
    const int32_t end = size * int32_t(sizeof(S));  // in bytes, as those from here on
    const int32_t ahead = -off & 15, behind = (end + off) & 15,
                  mine = lane % kSize * int32_t(sizeof(S));
    const bool head = lane < kSize && mine < min(ahead, end);
    const bool tail = lane >= kSize && lane < 2 * kSize && mine < behind && end - behind >= ahead;
    if (head || tail) {
      const int32_t index = ((head ? 0 : end - behind) + mine) / int32_t(sizeof(S));
      to[index] = from[index];
    }
  }
};

}  // namespace softtopk::cuda
