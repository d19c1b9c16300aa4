// A step of Adam: everything is read once and written once.
//
// Rows are blocks: where they are scaled to unit norm, a thread keeps what it has made of its part
// in registers until the norm is known; a row without a gradient costs a look at two offsets. All
// else is a flat sweep, of many parameters in one launch: most are so small that a launch is all
// they cost. What depends on the step alone is worked out by one thread of each block while the
// loads of the others are on their way.
#include "launch.cuh"

namespace softtopk::cuda {
namespace {

template <int WIDTH>
struct alignas(4 * WIDTH) Floats {
  float at[WIDTH];
};
template <int WIDTH>
struct alignas(2 * WIDTH) Halves {
  uint16_t at[WIDTH];
};

struct AdamArgs {
  float* parameter;
  const float* gradient;
  float *exp_avg, *exp_avg_sq;
  void* copy;
  int64_t rows, d;
  const float* lr;
  double lr_number, log_beta1, log_beta2;
  float beta1, beta2, rest1, rest2, eps;  // rest: 1 - beta
  const float *step, *scale, *found_inf;
  const int32_t* offsets;
  bool normalize;
};

// What all elements have in common.
struct Rates {
  float step_size, root, scale;  // root: 1 / sqrt(1 - beta2^step)
  bool skip;
};

__device__ __forceinline__ Rates rates(const AdamArgs& args) {
  const double step = *args.step;
  const double lr = args.lr != nullptr ? double(*args.lr) : args.lr_number;
  Rates out;
  out.step_size = float(lr / -expm1(step * args.log_beta1));
  out.root = float(1 / sqrt(-expm1(step * args.log_beta2)));
  out.scale = args.scale != nullptr ? *args.scale : 1.f;
  out.skip = args.found_inf != nullptr && *args.found_inf != 0;
  return out;
}

// What a thread has of the four arrays at one place.
template <int WIDTH>
struct Place {
  Floats<WIDTH> g, m, v, p;

  __device__ __forceinline__ void load(const AdamArgs& args, int64_t i) {
    g = reinterpret_cast<const Floats<WIDTH>*>(args.gradient)[i];
    m = reinterpret_cast<const Floats<WIDTH>*>(args.exp_avg)[i];
    v = reinterpret_cast<const Floats<WIDTH>*>(args.exp_avg_sq)[i];
    p = reinterpret_cast<const Floats<WIDTH>*>(args.parameter)[i];
  }
  __device__ __forceinline__ void update(const AdamArgs& args, const Rates& by) {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      const float gradient = g.at[e] * by.scale;
      m.at[e] += (gradient - m.at[e]) * args.rest1;
      v.at[e] = v.at[e] * args.beta2 + gradient * gradient * args.rest2;
      p.at[e] -= by.step_size * m.at[e] / (sqrtf(v.at[e]) * by.root + args.eps);
    }
  }
  __device__ __forceinline__ void store_moments(const AdamArgs& args, int64_t i) const {
    reinterpret_cast<Floats<WIDTH>*>(args.exp_avg)[i] = m;
    reinterpret_cast<Floats<WIDTH>*>(args.exp_avg_sq)[i] = v;
  }
};

template <int WIDTH>
__device__ __forceinline__ void store_parameter(const AdamArgs& args, int64_t i,
                                                const Floats<WIDTH>& p) {
  reinterpret_cast<Floats<WIDTH>*>(args.parameter)[i] = p;
  if (args.copy == nullptr) return;
  Halves<WIDTH> rounded;
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) rounded.at[e] = Element<__nv_bfloat16>::raw(p.at[e]);
  static_cast<Halves<WIDTH>*>(args.copy)[i] = rounded;
}

constexpr int kFlatThreads = 256, kFlatItems = 2;
constexpr int kTogether = 20;  // parameters of a launch, whose arguments have room for 4 KB

// Parameter i has the blocks from first[i] to first[i + 1].
struct FlatArgs {
  AdamArgs of[kTogether];
  int32_t first[kTogether + 1];
};
static_assert(sizeof(FlatArgs) <= 4096);

// Elements as one sequence; with offsets (d = 1) those without a gradient are left alone.
template <int WIDTH>
__global__ void __launch_bounds__(kFlatThreads)
    adam_flat_kernel(const __grid_constant__ FlatArgs all) {
  __shared__ Rates shared_rates;
  int which = 0;
  while (int32_t(blockIdx.x) >= all.first[which + 1]) ++which;
  const AdamArgs& args = all.of[which];
  const int64_t block = int32_t(blockIdx.x) - all.first[which];
  const int64_t places = args.rows * args.d / WIDTH;
  const int64_t first = block * (kFlatThreads * kFlatItems) + int(threadIdx.x);
  const auto has = [&](int64_t i) {
    if (i >= places) return false;
    return WIDTH > 1 || args.offsets == nullptr || args.offsets[i] != args.offsets[i + 1];
  };
  Place<WIDTH> place[kFlatItems];
  bool taken[kFlatItems];
#pragma unroll
  for (int item = 0; item < kFlatItems; ++item) {
    const int64_t i = first + item * kFlatThreads;
    taken[item] = has(i);
    if (taken[item]) place[item].load(args, i);
  }
  if (threadIdx.x == 0) shared_rates = rates(args);
  __syncthreads();
  const Rates by = shared_rates;
  if (by.skip) return;
#pragma unroll
  for (int item = 0; item < kFlatItems; ++item) {
    if (!taken[item]) continue;
    const int64_t i = first + item * kFlatThreads;
    place[item].update(args, by);
    place[item].store_moments(args, i);
    store_parameter(args, i, place[item].p);
  }
  // The last elements, fewer than a width.
  const int64_t rest = places * WIDTH + int(threadIdx.x);
  if (WIDTH > 1 && block == 0 && rest < args.rows * args.d) {
    Place<1> last;
    last.load(args, rest);
    last.update(args, by);
    last.store_moments(args, rest);
    store_parameter(args, rest, last.p);
  }
}

constexpr int kMostWarps = 16;

struct SumOfSquares {
  float value;
  __device__ void combine(const SumOfSquares& other) { value += other.value; }
};

// A block for each row; ITEMS places of a thread are kept, 0: none.
template <int WIDTH, int ITEMS>
__global__ void __launch_bounds__(32 * kMostWarps) adam_rows_kernel(const AdamArgs args) {
  struct Storage {
    Rates rates;
    float squares[kMostWarps];
  };
  __shared__ Storage storage;
  const int64_t row = blockIdx.x;
  if (args.offsets != nullptr && args.offsets[row] == args.offsets[row + 1]) return;
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const int64_t places = args.d / WIDTH, base = row * places;

  Place<WIDTH> place[ITEMS > 0 ? ITEMS : 1];
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    const int64_t i = thread + item * threads;
    if (i < places) place[item].load(args, base + i);
  }
  if (thread == 0) storage.rates = rates(args);
  __syncthreads();
  const Rates by = storage.rates;
  if (by.skip) return;

  SumOfSquares squares{0};
  const auto step = [&](Place<WIDTH>& at, int64_t i) {
    at.update(args, by);
    at.store_moments(args, i);
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) squares.value += at.p.at[e] * at.p.at[e];
  };
  if constexpr (ITEMS > 0) {
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
      const int64_t i = thread + item * threads;
      if (i < places) step(place[item], base + i);
    }
  } else {
    for (int64_t i = thread; i < places; i += threads) {
      place[0].load(args, base + i);
      step(place[0], base + i);
      store_parameter(args, base + i, place[0].p);
    }
    if (!args.normalize) return;
  }

  float norm = 1;
  if (args.normalize) {
    const float mine = reduce_lanes<32>(squares).value;
    if (thread % 32 == 0) storage.squares[thread / 32] = mine;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < threads / 32; ++warp) sum += storage.squares[warp];
    norm = sqrtf(sum);
    norm = norm < 1e-12f ? 1e-12f : norm;  // and not fmaxf, which hides a NaN
  }
  const auto finish = [&](Floats<WIDTH>& p, int64_t i) {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) p.at[e] = args.normalize ? p.at[e] / norm : p.at[e];
    store_parameter(args, i, p);
  };
  if constexpr (ITEMS > 0) {
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
      const int64_t i = thread + item * threads;
      if (i < places) finish(place[item].p, base + i);
    }
  } else {
    for (int64_t i = thread; i < places; i += threads) {
      Floats<WIDTH> p = reinterpret_cast<const Floats<WIDTH>*>(args.parameter)[base + i];
      finish(p, base + i);
    }
  }
}

template <class Args>
void start(void (*kernel)(Args), Args args, int64_t blocks, int64_t threads, void* stream) {
  if (blocks == 0) return;
  void* pointers[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers, 0,
                         static_cast<cudaStream_t>(stream)),
        "kernel launch");
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int WIDTH>
void start_rows(const AdamArgs& args, void* stream) {
  const int64_t places = args.d / WIDTH;
  const auto threads = [&](int64_t items) { return divide_up(divide_up(places, items), 32) * 32; };
  const auto fits = [&](int64_t items) { return threads(items) <= 32 * kMostWarps; };
  if (fits(1)) return start(adam_rows_kernel<WIDTH, 1>, args, args.rows, threads(1), stream);
  if (fits(2)) return start(adam_rows_kernel<WIDTH, 2>, args, args.rows, threads(2), stream);
  if (fits(4)) return start(adam_rows_kernel<WIDTH, 4>, args, args.rows, threads(4), stream);
  start(adam_rows_kernel<WIDTH, 0>, args, args.rows, 32 * kMostWarps, stream);
}

template <int WIDTH>
int64_t flat_blocks(const AdamArgs& args) {
  const int64_t places = std::max<int64_t>(args.rows * args.d / WIDTH, 1);
  return divide_up(places, kFlatThreads * kFlatItems);
}

template <int WIDTH>
void start_flat(const AdamArgs& args, void* stream) {
  FlatArgs all{};
  all.of[0] = args;
  all.first[1] = int32_t(flat_blocks<WIDTH>(args));
  start(adam_flat_kernel<WIDTH>, all, all.first[1], kFlatThreads, stream);
}

// Whether all places are whole vectors of four; those of the copy are half as wide.
bool aligned(const AdamArgs& args) {
  uintptr_t places = reinterpret_cast<uintptr_t>(args.copy) * 2;
  for (const void* data :
       {static_cast<const void*>(args.parameter), static_cast<const void*>(args.gradient),
        static_cast<const void*>(args.exp_avg), static_cast<const void*>(args.exp_avg_sq)}) {
    places |= reinterpret_cast<uintptr_t>(data);
  }
  return places % 16 == 0;
}

// A flat parameter as one row.
AdamArgs flat_args(const FlatParameter& of, const float* found_inf) {
  return {of.parameter,
          of.gradient,
          of.exp_avg,
          of.exp_avg_sq,
          of.copy,
          1,
          of.size,
          of.lr,
          of.lr_number,
          log(of.beta1),
          log(of.beta2),
          float(of.beta1),
          float(of.beta2),
          float(1 - of.beta1),
          float(1 - of.beta2),
          float(of.eps),
          of.step,
          of.scale,
          found_inf,
          nullptr,
          false};
}

}  // namespace

void adam_flat(const FlatParameter* parameters, int64_t count, const float* found_inf, int device,
               void* stream) {
  const DeviceGuard guard(device);
  FlatArgs all{};
  int together = 0;
  const auto launch = [&] {
    if (together > 0) {
      start(adam_flat_kernel<4>, all, all.first[together], kFlatThreads, stream);
    }
    together = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (parameters[i].size == 0) continue;
    const AdamArgs args = flat_args(parameters[i], found_inf);
    if (!aligned(args)) {
      start_flat<1>(args, stream);
      continue;
    }
    const int64_t blocks = flat_blocks<4>(args);
    if (together == kTogether || (together > 0 && all.first[together] + blocks > 0x7fffffff)) {
      launch();
    }
    all.of[together] = args;
    all.first[together + 1] = int32_t(all.first[together] + blocks);
    ++together;
  }
  launch();
}

void adam_rows(float* parameter, const float* gradient, float* exp_avg, float* exp_avg_sq,
               void* copy, int64_t rows, int64_t d, const float* lr, double lr_number, double beta1,
               double beta2, double eps, const float* step, const float* scale,
               const float* found_inf, const int32_t* offsets, bool normalize, int device,
               void* stream) {
  if (rows == 0 || d == 0) return;
  const DeviceGuard guard(device);
  const AdamArgs args = {parameter,
                         gradient,
                         exp_avg,
                         exp_avg_sq,
                         copy,
                         rows,
                         d,
                         lr,
                         lr_number,
                         log(beta1),
                         log(beta2),
                         float(beta1),
                         float(beta2),
                         float(1 - beta1),
                         float(1 - beta2),
                         float(eps),
                         step,
                         scale,
                         found_inf,
                         offsets,
                         normalize};
  if (!normalize && d == 1) return start_flat<1>(args, stream);
  if (aligned(args) && d % 4 == 0) return start_rows<4>(args, stream);
  start_rows<1>(args, stream);
}

}  // namespace softtopk::cuda
