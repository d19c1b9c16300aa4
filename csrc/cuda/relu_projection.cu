// relu(x W^T + c) . w2 a chunk of columns at a time, around the library's products
// (softtopk/backends/projection.py): what is done with a chunk of the hidden layer while it is in
// the L2 cache. A thread owns eight columns, and with them a byte of the mask.
#include "launch.cuh"
#include "layout.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kColumns = 8, kWarps = 8;

// Eight neighbouring elements of a row that starts on 16 bytes.
template <class S>
struct Eight {
  static constexpr int chunks = kColumns / Chunk<S>::size;
  Chunk<S> chunk[chunks];

  __device__ static Eight load(const S* from) {
    Eight eight;
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      eight.chunk[i].words = reinterpret_cast<const uint4*>(from)[i];
    }
    return eight;
  }
  __device__ void store(S* to) const {
#pragma unroll
    for (int i = 0; i < chunks; ++i) store_global(to + i * Chunk<S>::size, chunk[i].words);
  }
  __device__ Compute<S> value(int i) const {
    return Element<S>::value(chunk[i / Chunk<S>::size].raw(i % Chunk<S>::size));
  }
  // A value where the bit of the element is set, else 0.
  __device__ static Eight where(uint32_t bits, Compute<S> value) {
    const typename Element<S>::Raw raw = Element<S>::raw(value);
    Eight eight{};
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      eight.chunk[i / Chunk<S>::size].set_raw(i % Chunk<S>::size, (bits >> i & 1) != 0 ? raw : 0);
    }
    return eight;
  }
};

template <class T>
struct Sum {
  T value;
  __device__ void combine(const Sum& other) { value += other.value; }
};

struct DotArgs {
  const void* hidden;
  const void* w2;
  void* scores;
  uint8_t* mask;
  int64_t rows, columns, stride, mask_stride;
  bool add;
};

// A block reads all columns of a few rows, which are in flight at once.
template <class S>
__global__ void __launch_bounds__(32 * kWarps, 3) relu_dot_kernel(const DotArgs args) {
  using T = Compute<S>;
  constexpr int kRows = 16 / sizeof(S);
  struct Storage {
    T sums[kRows][kWarps];
  };
  __shared__ Storage storage;

  const int64_t first_row = int64_t(blockIdx.x) * kRows;
  const int left = int(min(int64_t(kRows), args.rows - first_row));
  const int thread = int(threadIdx.x);
  const T* w2 = static_cast<const T*>(args.w2);
  T sums[kRows] = {};
  for (int64_t first = thread / 32 * 32 * kColumns; first < args.columns;
       first += 32 * kWarps * kColumns) {
    const int64_t own = first + thread % 32 * kColumns;
    const int here = int(max(min(int64_t(kColumns), args.columns - own), int64_t(0)));
    const int64_t column = here > 0 ? own : first;
    Eight<S> z[kRows];
    // From row to row: pointers to all of them would take the registers of the rows themselves.
    const S* from = static_cast<const S*>(args.hidden) + first_row * args.stride + column;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // rows beyond the last are the last again
      z[r] = Eight<S>::load(from);
      if (r + 1 < left) from += args.stride;
    }
    __syncwarp();  // the compiler would put every load where it is used
    T weight[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) weight[i] = i < here ? w2[column + i] : T(0);
    const uint32_t columns_here = (1u << here) - 1;
    uint8_t* to = args.mask + first_row * args.mask_stride + column / kColumns;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) bits |= uint32_t(!(z[r].value(i) <= 0)) << i;  // NaN too
      bits &= columns_here;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (bits >> i & 1) sums[r] += z[r].value(i) * weight[i];
      }
      if (r < left && here > 0) *to = uint8_t(bits);
      to += args.mask_stride;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const T sum = reduce_lanes<32>(Sum<T>{sums[r]}).value;
    if (thread % 32 == 0) storage.sums[r][thread / 32] = sum;
  }
  __syncthreads();
  if (thread < left) {
    T sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += storage.sums[thread][warp];
    T* score = static_cast<T*>(args.scores) + first_row + thread;
    *score = args.add ? *score + sum : sum;
  }
}

constexpr int kExpanding = 128;  // threads of a block
constexpr int kPart = 32;        // rows whose g are added up by one thread; a lane loads each

struct ExpandArgs {
  const uint8_t* mask;
  const void* g;
  void* expanded;
  void* sums;
  int64_t rows, columns, stride, mask_stride;
  int64_t blocks;  // that share a part's columns
};

template <class S>
__global__ void __launch_bounds__(kExpanding) expand_mask_kernel(const ExpandArgs args) {
  using T = Compute<S>;
  constexpr int kBatch = 8;
  const int lane = int(threadIdx.x) % 32;
  const int64_t part = blockIdx.x / args.blocks;
  const int64_t first_byte = blockIdx.x % args.blocks * kExpanding + int(threadIdx.x) / 32 * 32;
  if (first_byte * kColumns >= args.columns) return;
  const bool has = (first_byte + lane) * kColumns < args.columns;
  const int64_t byte = has ? first_byte + lane : first_byte, column = byte * kColumns;
  const int64_t first = part * kPart;
  const int rows = int(min(int64_t(kPart), args.rows - first));
  const T g = lane < rows ? static_cast<const T*>(args.g)[first + lane] : T(0);
  S* expanded = static_cast<S*>(args.expanded) + first * args.stride + column;
  T sums[kColumns] = {};
  for (int begin = 0; begin < rows; begin += kBatch) {
    uint32_t bits[kBatch];
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      bits[r] = args.mask[(first + min(begin + r, rows - 1)) * args.mask_stride + byte];
    }
    __syncwarp();  // the compiler would put every load where it is used
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      const T of_row = __shfl_sync(0xffffffffu, g, begin + r);
      if (begin + r < rows && has) Eight<S>::where(bits[r], of_row).store(expanded);
      expanded += args.stride;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (bits[r] >> i & 1) sums[i] += of_row;  // 0 beyond the last row
      }
    }
  }
  if (!has) return;
  T* to = static_cast<T*>(args.sums) + part * args.columns + column;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (column + i < args.columns) to[i] = sums[i];
  }
}

struct ScaleArgs {
  const void *products, *weight, *bias, *w2, *sums;
  void *grad_weight, *grad_bias, *grad_w2, *squares;
  int64_t columns, d, sums_stride, parts;
};

template <class S, int WIDTH>
struct alignas(sizeof(S) * WIDTH < 16 ? sizeof(S) * WIDTH : 16) Pack {
  typename Element<S>::Raw raw[WIDTH];
};

// A warp for each column of the hidden layer, that is a row of its weight.
template <class S, class OUT, int WIDTH>
__global__ void __launch_bounds__(32 * kWarps) scale_gradient_kernel(const ScaleArgs args) {
  using T = Compute<S>;
  const int64_t j = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  const int lane = int(threadIdx.x) % 32;
  if (j >= args.columns) return;
  const T* sums = static_cast<const T*>(args.sums) + j;
  Sum<T> gamma{0}, dot{0}, square{0};
  for (int64_t part = lane; part < args.parts; part += 32)
    gamma.value += sums[part * args.sums_stride];
  const int64_t places = args.d / WIDTH;
  const auto* products = static_cast<const Pack<T, WIDTH>*>(args.products) + j * places;
  const auto* weight = static_cast<const Pack<S, WIDTH>*>(args.weight) + j * places;
  auto* to = static_cast<Pack<OUT, WIDTH>*>(args.grad_weight) + j * places;
  const T w2 = static_cast<const T*>(args.w2)[j];
  constexpr int kBatch = 4;  // loads in flight; no load can pass a store that may be to its place
  for (int64_t first = lane; first < places; first += 32 * kBatch) {
    Pack<T, WIDTH> product[kBatch];
    Pack<S, WIDTH> w[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t i = first + 32 * b;
      if (i < places) product[b] = products[i], w[b] = weight[i];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t i = first + 32 * b;
      if (i >= places) break;
      Pack<OUT, WIDTH> scaled;
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) {
        const T p = Element<T>::value(product[b].raw[e]);
        dot.value += p * Element<S>::value(w[b].raw[e]);
        square.value += w2 * p * (w2 * p);
        scaled.raw[e] = Element<OUT>::raw(w2 * p);
      }
      to[i] = scaled;
    }
  }
  gamma = reduce_lanes<32>(gamma);
  dot = reduce_lanes<32>(dot);
  square = reduce_lanes<32>(square);
  if (lane != 0) return;
  const T bias = Element<S>::value(static_cast<const typename Element<S>::Raw*>(args.bias)[j]);
  static_cast<T*>(args.grad_bias)[j] = w2 * gamma.value;
  static_cast<T*>(args.grad_w2)[j] = dot.value + bias * gamma.value;
  if (args.squares != nullptr) static_cast<T*>(args.squares)[j] = square.value;
}

template <class Args>
void start(void (*kernel)(Args), Args args, int64_t blocks, int threads, void* stream) {
  if (blocks == 0) return;
  void* pointers[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers, 0,
                         static_cast<cudaStream_t>(stream)),
        "kernel launch");
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void relu_dot(const void* hidden, Type type, int64_t rows, int64_t columns, int64_t stride,
              const void* w2, bool add, void* scores, uint8_t* mask, int64_t mask_stride,
              int device, void* stream) {
  const DeviceGuard guard(device);
  const DotArgs args = {hidden, w2, scores, mask, rows, columns, stride, mask_stride, add};
  with_type(type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    start(relu_dot_kernel<S>, args, divide_up(rows, 16 / int64_t(sizeof(S))), 32 * kWarps, stream);
  });
}

int64_t expand_mask_parts(int64_t rows) { return divide_up(rows, kPart); }

void expand_mask(const uint8_t* mask, int64_t mask_stride, int64_t rows, int64_t columns, Type type,
                 const void* g, void* expanded, int64_t stride, void* sums, int device,
                 void* stream) {
  const DeviceGuard guard(device);
  const int64_t blocks = divide_up(columns, kExpanding * kColumns);
  const ExpandArgs args = {mask, g, expanded, sums, rows, columns, stride, mask_stride, blocks};
  with_type(type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    start(expand_mask_kernel<S>, args, blocks * expand_mask_parts(rows), kExpanding, stream);
  });
}

void scale_gradient(const void* products, const void* weight, Type type, const void* bias,
                    const void* w2, const void* sums, int64_t sums_stride, int64_t parts,
                    int64_t columns, int64_t d, void* grad_weight, Type out_type, void* grad_bias,
                    void* grad_w2, void* squares, int device, void* stream) {
  const DeviceGuard guard(device);
  const ScaleArgs args = {products, weight,  bias,    w2, sums,        grad_weight, grad_bias,
                          grad_w2,  squares, columns, d,  sums_stride, parts};
  const auto by_four = [&](const void* data, int64_t size) {
    return reinterpret_cast<uintptr_t>(data) % std::min<int64_t>(16, 4 * size) == 0;
  };
  with_type(type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Compute<S>;
    const auto run = [&](auto out) {
      using Out = typename decltype(out)::type;
      const bool wide = d % 4 == 0 && by_four(products, sizeof(T)) && by_four(weight, sizeof(S)) &&
                        by_four(grad_weight, sizeof(Out));
      start(wide ? scale_gradient_kernel<S, Out, 4> : scale_gradient_kernel<S, Out, 1>, args,
            divide_up(columns, kWarps), 32 * kWarps, stream);
    };
    if (out_type == type) {
      run(Tag<S>());
    } else {
      run(Tag<T>());
    }
  });
}

}  // namespace softtopk::cuda
