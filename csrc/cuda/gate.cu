// Activations times their gates, and the gradients of both: one pass each over whole vectors of 16
// bytes. A gate of at most `cut` counts as 0, but for its own gradient; with `rectified` that of
// the activations goes on through the ReLU that they are from.
#include "launch.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kThreads = 256, kItems = 2;

struct GateArgs {
  const void *a, *p, *g;
  double cut;
  bool rectified;
  int64_t size;
  void *of_a, *of_p;  // of_a: the product itself in the forward; of_p: null where it is not wanted
};

template <class S>
__device__ __forceinline__ Compute<S> gate(Compute<S> p, Compute<S> cut) {
  return p <= cut ? Compute<S>(0) : p;  // NaN stays
}

// The chunks of a thread are all in flight before one is used; the elements behind the last whole
// one are the first block's.
template <class S, bool BACKWARD>
__global__ void __launch_bounds__(kThreads) gate_kernel(const GateArgs args) {
  using T = Compute<S>;
  using Raw = typename Element<S>::Raw;
  constexpr int kSize = Chunk<S>::size;
  const T cut = T(args.cut);
  const auto one = [&](Raw a, Raw p, Raw g, Raw& of_a, Raw& of_p) {
    const T factor = gate<S>(Element<S>::value(p), cut), value = Element<S>::value(a);
    if constexpr (BACKWARD) {
      const bool off = args.rectified && value <= 0;
      of_a = Element<S>::raw(off ? T(0) : Element<S>::value(g) * factor);
      of_p = Element<S>::raw(Element<S>::value(g) * value);
    } else {
      of_a = Element<S>::raw(value * factor);
    }
  };
  const int64_t chunks = args.size / kSize;
  const int64_t first = int64_t(blockIdx.x) * (kThreads * kItems) + int(threadIdx.x);
  Chunk<S> a[kItems], p[kItems], g[kItems];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t i = first + item * kThreads;
    if (i >= chunks) continue;
    a[item].words = static_cast<const uint4*>(args.a)[i];
    p[item].words = static_cast<const uint4*>(args.p)[i];
    if (BACKWARD) g[item].words = static_cast<const uint4*>(args.g)[i];
  }
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t i = first + item * kThreads;
    if (i >= chunks) continue;
    Chunk<S> of_a{}, of_p{};
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      Raw to_a = 0, to_p = 0;
      one(a[item].raw(e), p[item].raw(e), BACKWARD ? g[item].raw(e) : Raw(0), to_a, to_p);
      of_a.set_raw(e, to_a);
      if (BACKWARD) of_p.set_raw(e, to_p);
    }
    static_cast<uint4*>(args.of_a)[i] = of_a.words;
    if (BACKWARD && args.of_p != nullptr) static_cast<uint4*>(args.of_p)[i] = of_p.words;
  }
  const int64_t rest = chunks * kSize + int(threadIdx.x);
  if (blockIdx.x == 0 && rest < args.size) {
    const auto at = [&](const void* data) { return static_cast<const Raw*>(data)[rest]; };
    Raw to_a = 0, to_p = 0;
    one(at(args.a), at(args.p), BACKWARD ? at(args.g) : Raw(0), to_a, to_p);
    static_cast<Raw*>(args.of_a)[rest] = to_a;
    if (BACKWARD && args.of_p != nullptr) static_cast<Raw*>(args.of_p)[rest] = to_p;
  }
}

void run(bool backward, GateArgs args, Type type, int device, void* stream) {
  if (args.size == 0) return;
  const DeviceGuard guard(device);
  with_type(type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const int64_t each = int64_t(kThreads) * kItems * Chunk<S>::size;
    const int64_t blocks = (args.size + each - 1) / each;
    void* pointers[] = {&args};
    const auto kernel = backward ? gate_kernel<S, true> : gate_kernel<S, false>;
    check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(kThreads), pointers, 0,
                           static_cast<cudaStream_t>(stream)),
          "kernel launch");
  });
}

}  // namespace

void gate_forward(const void* a, const void* p, Type type, double cut, int64_t size, void* out,
                  int device, void* stream) {
  run(false, {a, p, nullptr, cut, false, size, out, nullptr}, type, device, stream);
}

void gate_backward(const void* a, const void* p, const void* g, Type type, double cut,
                   bool rectified, int64_t size, void* of_a, void* of_p, int device, void* stream) {
  run(true, {a, p, g, cut, rectified, size, of_a, of_p}, type, device, stream);
}

}  // namespace softtopk::cuda
