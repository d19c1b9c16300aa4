// The gradients of a piece of the entries (sparse_gradients.cu) on tensor cores, for bfloat16.
//
// Sixteen entries at a time, of up to four latents, in a chunk of 64 columns (gather.cuh). The tile
// of their rows of y, turned, times their scales, a latent to a column, is what they add to the
// rows of the gradient; turned back, times the rows of the weight, it is their dots: with neither
// an element converted nor a sum taken across lanes. A block has a piece and up to kTileWarps tiles
// of the columns, one to a warp, or all of them where the gradient is projected. A value of y that
// is not finite also reaches the other latents of its sixteen entries.
#pragma once

#include "gather.cuh"
#include "gradient_args.cuh"

namespace softtopk::cuda {

constexpr int kTileChunks = SOFTTOPK_TILE_CHUNKS;  // of 64 columns, of a warp
constexpr int kTileColumns = kTileChunks * 64;
constexpr int kTileWarps = 4;                  // of a block, at most
constexpr int kWholeWarps = 64 / kTileChunks;  // of one that has all columns

// What a block has to know of an entry: 16 bytes, which are read at once.
struct TileEntry {
  int32_t row, place, latent;
  float scale;

  __device__ static TileEntry load(const int4& words) {
    return {words.x, words.y, words.z, __int_as_float(anew(words.w))};
  }
  __device__ int4 store() const { return {row, place, latent, __float_as_int(scale)}; }
};

template <class O, bool FULL, bool DOTS, bool WHOLE>
__global__ void __launch_bounds__(WHOLE ? kWholeWarps * 32 : kTileWarps * 32,
                                  WHOLE ? 1 : SOFTTOPK_TILE_BLOCKS)
    add_tiles(const GradientArgs args) {
  using S = __nv_bfloat16;
  constexpr int kMost = 2 * kPiece;  // entries: the last latent may reach beyond the piece
  constexpr int kWarps = WHOLE ? kWholeWarps : kTileWarps;
  __shared__ int4 entries[kMost + 16];
  __shared__ uint32_t begins[kMost / 32 + 1];  // where a latent begins
  __shared__ float dots[DOTS ? kWarps : 1][kMost + 16];
  __shared__ float squares[kWarps][kMost];
  __shared__ float along[WHOLE ? 2 : 1][WHOLE ? kWarps : 1][4];
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int threads = int(blockDim.x), warps = threads / 32, g = lane / 4, t = lane % 4;
  const int32_t total = args.offsets[args.n];
  const int64_t piece = blockIdx.x;
  if (piece * kPiece >= total) return;
  const int32_t begin = int32_t(piece) * kPiece, limit = min(begin + kPiece, total);

  // Entries are counted from `begin`.
  const int32_t first = args.indices[args.entries[begin]];
  const int32_t last = args.indices[args.entries[limit - 1]];
  for (int i = thread; i < kMost + 16; i += threads) {
    TileEntry entry = {0, 0, 0, 0};
    if (i < kMost && begin + i < total) {
      entry.place = args.entries[begin + i];
      entry.row = int32_t(uint32_t(entry.place) / uint32_t(args.max_active));
      entry.latent = args.indices[entry.place];
      entry.scale = static_cast<const float*>(args.scale)[entry.place];
    }
    entries[i] = entry.store();
  }
  const Span span(args, begin, limit, first, last);
  const int lo = span.from - begin, hi = span.to - begin;
  if (lo >= hi) return;
  __syncthreads();
  for (int base = 0; base <= kMost; base += threads) {
    const int i = base + thread;
    const bool is_one = i >= lo && i < hi && (i == lo || entries[i].z != entries[i - 1].z);
    const uint32_t word = __ballot_sync(~0u, is_one);
    if (lane == 0 && i <= kMost) begins[i / 32] = word;
  }
  __syncthreads();
  int latents = 0;
#pragma unroll
  for (int i = 0; i < kMost / 32; ++i) latents += __popc(begins[i]);

  const int32_t d = int32_t(args.d), bytes = 2 * d;
  // The lane's columns: eight from `column` on of every chunk; of the weight's rows sixteen from
  // `weight_column` on.
  const int32_t tile = (int32_t(blockIdx.y) * warps + warp) * kTileColumns;
  const int32_t column = tile + 8 * g, weight_column = tile + 16 * t;
  const auto* const y = anew(static_cast<const unsigned char*>(args.y) + 2 * column);
  const auto* const weight =
      anew(static_cast<const unsigned char*>(args.weight) + 2 * weight_column);
  const unsigned char* const none = anew(nowhere() + 16 * g);
  const auto load = [&](const unsigned char* row, int32_t column, int chunk) {
    uint4 words = make_uint4(0, 0, 0, 0);
    if (FULL || column + chunk * 64 < d) {
      words = __ldg(reinterpret_cast<const uint4*>(row + chunk * 128));
    }
    return words;
  };

  float sum[kTileChunks][4][4] = {};
  int turn = 0;
  int ordinal = 0;  // of the latent of entry p, among those of the block
#pragma unroll 1
  for (int p = lo; p < hi;) {
    // Up to 16 entries from p on, of no more than 4 latents: `marks` has bit i - 1 set where a
    // latent begins with the i-th. A latent's slot is its ordinal modulo 4.
    uint32_t marks =
        __funnelshift_r(begins[(p + 1) / 32], begins[min((p + 1) / 32 + 1, kMost / 32)],
                        uint32_t(p + 1) % 32) &
        0xffffu;
    int begin_of[4] = {0, 0, 0, 0};  // the latents' first entries
    uint32_t later = marks;
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      begin_of[i] = __ffs(int(later));
      later &= later - 1;
    }
    int size = min(hi - p, 16);
    if (later != 0) size = min(size, __ffs(int(later)));
    const int more = __popc(marks & ((1u << (size - 1)) - 1));  // latents after the first
    // Those before `next` have no entry beyond these.
    const int next = ordinal + more + (p + size == hi || (marks >> (size - 1) & 1));

    // The lane's entries, and where their rows are.
    const unsigned char* rows[4];
    uint32_t scales[2] = {0, 0}, rests[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int e = 2 * t + i % 2 + 8 * (i / 2);
      const auto entry = TileEntry::load(entries[p + e]);
      const bool there = e < size;
      const unsigned char* const row = anew(y + int64_t(entry.row) * bytes);
      rows[i] = there ? row : none;
      const int slot = ordinal + __popc(marks & ((1u << e) - 1));
      const float scale = there && (slot & 3) == g / 2 ? entry.scale : 0.0f;
      uint32_t parts[3];
      split(scale, parts);
      scales[i / 2] |= (g % 2 == 0 ? parts[0] : parts[1]) << (16 * (i % 2));
      rests[i / 2] |= (g % 2 == 0 ? parts[2] : 0) << (16 * (i % 2));
    }
    const unsigned char* weight_row = nowhere();
    if (DOTS) {
      const int which = (g - ordinal) & 3;
      const int e = which == 0   ? 0
                    : which == 1 ? begin_of[1]
                    : which == 2 ? begin_of[2]
                                 : begin_of[3];
      const unsigned char* const row = anew(weight + int64_t(entries[p + e].z) * bytes);
      if (which <= more) weight_row = row;
    }

    float dot[4] = {};
#pragma unroll
    for (int c = 0; c < kTileChunks; ++c) {
      uint4 x[4], w[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = load(rows[i], column, c);
      if (DOTS) {
        w[0] = load(weight_row, weight_column, c);
        w[1] = load(weight_row + 16, weight_column + 8, c);
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const Turned a(x, m);
        multiply_add(sum[c][m], a.words, scales);
        if (sizeof(O) == 4) multiply_add(sum[c][m], a.words, rests);
        if (DOTS) {
          const uint32_t back[4] = {transposed(a.words[0]), transposed(a.words[2]),
                                    transposed(a.words[1]), transposed(a.words[3])};
          const uint32_t weights[2] = {__byte_perm(word_of(w[0], m), word_of(w[1], m), 0x5410),
                                       __byte_perm(word_of(w[0], m), word_of(w[1], m), 0x7632)};
          multiply_add(dot, back, weights);
        }
      }
    }
    if (DOTS) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int e = g + 8 * i;
        const int slot = (ordinal + __popc(marks & ((1u << e) - 1))) & 3;
        if (slot / 2 == t && e < size)
          dots[warp][p + e] = slot % 2 == 0 ? dot[2 * i] : dot[2 * i + 1];
      }
    }

    if (next > ordinal) {
      // The lane has columns of the latent in slot t.
      const int which = (t - ordinal) & 3;
      const bool ended = ordinal + which < next;
      const int e = which == 0   ? 0
                    : which == 1 ? begin_of[1]
                    : which == 2 ? begin_of[2]
                                 : begin_of[3];
      const int32_t latent = entries[p + e].z;
      const bool sharing = span.shared && ordinal + which == latents - 1;
      float all = 0;  // the part along the weight, to be taken away
      const unsigned char* const own =
          WHOLE ? weight + int64_t(latent) * bytes + 2 * (column - weight_column) : nullptr;
      if (WHOLE) {
        float part = 0;
#pragma unroll
        for (int c = 0; c < kTileChunks; ++c) {
          float x[8], w[8];
          sums_of(sum[c], x);
          Chunk<S>{load(own, column, c)}.read(w);
#pragma unroll
          for (int j = 0; j < 8; ++j) part = fma(w[j], x[j], part);
        }
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) part += __shfl_xor_sync(~0u, part, mask);
        if (g == 0) along[turn][warp][t] = part;
        __syncthreads();
        for (int other = 0; other < warps; ++other) all += along[turn][other][t];
        turn ^= 1;
        if (sharing) all = 0;
      }
      float square = 0;
      if (ended) {
#pragma unroll
        for (int c = 0; c < kTileChunks; ++c) {
          float x[8];
          sums_of(sum[c], x);
          if (WHOLE) {
            float w[8];
            Chunk<S>{load(own, column, c)}.read(w);
#pragma unroll
            for (int j = 0; j < 8; ++j) x[j] = fma(-all, w[j], x[j]);
          }
#pragma unroll
          for (const float value : x) square = fma(value, value, square);
          if (FULL || column + c * 64 < d) {
            if (sharing) {
              store_8(static_cast<float*>(args.partial) + piece * d + column + c * 64, x);
            } else {
              store_8(static_cast<O*>(args.grad) + int64_t(latent) * d + column + c * 64, x);
            }
          }
#pragma unroll
          for (int m = 0; m < 4; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[c][m][j] = 0;
          }
        }
      }
      if (args.squares != nullptr) {
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) square += __shfl_xor_sync(~0u, square, mask);
        if (g == 0 && ended) squares[warp][ordinal + which] = square;
      }
    }
    ordinal = next;
    p += size;
  }

  // What the warps have of the same entries and latents.
  __syncthreads();
  for (int i = lo + thread; i < hi; i += threads) {
    const auto entry = TileEntry::load(entries[i]);
    if (DOTS) {
      float all = 0;
      for (int other = 0; other < warps; ++other) all += dots[other][i];
      if (gridDim.y == 1) {
        static_cast<float*>(args.dots)[entry.place] = all;
      } else {
        static_cast<float*>(args.partial_dots)[blockIdx.y * args.places + begin + i] = all;
      }
    }
    if (!(begins[i / 32] >> (i % 32) & 1)) continue;
    int which = 0;  // its latent's ordinal
    for (int word = 0; word < i / 32; ++word) which += __popc(begins[word]);
    which += __popc(begins[i / 32] & ((1u << (i % 32)) - 1));
    const bool sharing = span.shared && which == latents - 1;
    if (args.squares != nullptr && !sharing) {
      float all = 0;
      for (int other = 0; other < warps; ++other) all += squares[other][which];
      if (gridDim.y == 1) {
        static_cast<float*>(args.squares)[entry.latent] = all;
      } else {
        static_cast<float*>(args.partial_squares)[int64_t(blockIdx.y) * args.n + entry.latent] =
            all;
      }
    }
    if ((args.sums != nullptr || sharing) && blockIdx.y == 0) {
      float all = 0;
      for (int j = i; j < hi && entries[j].z == entry.latent; ++j) {
        all += TileEntry::load(entries[j]).scale;
      }
      if (sharing) {
        static_cast<float*>(args.partial_sums)[piece] = all;
      } else {
        static_cast<float*>(args.sums)[entry.latent] = all;
      }
    }
  }
}

}  // namespace softtopk::cuda
