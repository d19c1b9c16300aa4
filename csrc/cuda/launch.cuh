// From the host to the kernels: which configuration runs a row length, and the launch itself.
//
// Nothing here waits for the device or allocates on it, so that every call can be captured in a
// CUDA graph.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "row.cuh"

namespace softtopk::cuda {

// A configuration: the group that shares a row, where the row is, and how many chunks a thread
// keeps in registers.
template <class GROUP, template <class, class, int> class ROW, int ITEMS>
struct Layout {
  using Group = GROUP;
  template <class S>
  using Row = ROW<S, GROUP, ITEMS>;
  static constexpr int block = std::max(Group::threads, 128);
  static constexpr int rows_per_block = block / Group::threads;
  // Blocks that a multiprocessor must be able to hold, which limits registers to 64 a thread for
  // long rows, 80 for short ones and 128 for doubles and rows of many registers.
  static constexpr int resident(int size) {
    return (size == 8 || ITEMS > 2 ? 512 : ITEMS > 0 ? 768 : 1024) / block;
  }
  // The chunks that a row of n elements takes in shared memory.
  template <class S>
  __device__ static int32_t memory(int32_t n) {
    const int32_t chunks = (n + Chunk<S>::size - 1) / Chunk<S>::size;
    return (chunks + Group::threads - 1) / Group::threads * Group::threads;
  }
  // The row of the calling thread; it may lie beyond the last.
  __device__ static int64_t row(int64_t first) {
    return first + int64_t(blockIdx.x) * rows_per_block + int(threadIdx.x) / Group::threads;
  }
};

// Calls f(layout, bytes of dynamic shared memory) with the layout for rows of n elements of `size`
// bytes, ARRAYS of which a kernel keeps. The choice depends on n and size, and on the device only
// in where a long row is kept, not in who computes what.
// Without SHARED it is for rows that fit on chip only as far as warps hold them.
template <int ARRAYS, bool SHARED, class F>
void with_layout(int64_t n, int64_t size, int64_t shared_limit, F f) {
  constexpr int kItems = 8 / ARRAYS;
  const int64_t chunks = (n * size + 15) / 16;
  const auto bytes = [&](int64_t threads) {
    return (chunks + threads - 1) / threads * threads * 16 * ARRAYS;
  };
  if (chunks <= 32 * 2) {
    f(Layout<Warp, RegisterRow, 2>(), 0);
  } else if (chunks <= 32 * kItems) {
    f(Layout<Warp, RegisterRow, kItems>(), 0);
  } else {
    if constexpr (SHARED) {
      if (chunks <= 128 * kItems) return f(Layout<Block<128>, SharedRow, 0>(), bytes(128));
      if (chunks <= 256 * kItems) return f(Layout<Block<256>, SharedRow, 0>(), bytes(256));
      if (bytes(512) + int64_t(sizeof(Block<512>::Storage)) <= shared_limit) {
        return f(Layout<Block<512>, SharedRow, 0>(), bytes(512));
      }
    }
    f(Layout<Block<512>, GlobalRow, 0>(), 0);
  }
}

template <class S>
struct Tag {
  using type = S;
};

// Calls f(Tag<S>()) for the storage type S.
template <class F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::float32:
      return f(Tag<float>());
    case Type::float64:
      return f(Tag<double>());
    case Type::float16:
      return f(Tag<__half>());
    case Type::bfloat16:
      return f(Tag<__nv_bfloat16>());
  }
}

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // leave no error behind for others to find
  throw std::runtime_error(std::string("softtopk: ") + what + ": " + cudaGetErrorString(status));
}

// Makes a device the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Places in a row, padding included, are counted in 32 bits.
inline void check_length(int64_t n) {
  constexpr int64_t kLongest = 0x7fffffff - 1024 * 16;
  if (n > kLongest) {
    throw std::runtime_error("softtopk: n=" + std::to_string(n) +
                             " is more than the CUDA backend's " + std::to_string(kLongest));
  }
}

// What the launchers have to know of a device.
struct Device {
  int index;
  int multiprocessors;
  int64_t shared_limit;  // bytes of shared memory that a block can have
  int cluster_blocks;    // the most that a cluster can have, 1: there are none
  bool fed() const { return cluster_blocks > 1; }  // by bulk copies, which came with clusters
};

// Asked of the driver once. SOFTTOPK_CUDA_PATH=generic, for tests, does without clusters.
inline const Device& device_at(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
  };
  const char* path = std::getenv("SOFTTOPK_CUDA_PATH");
  const bool generic = path != nullptr && std::string(path) == "generic";
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  const Device device = {index, attribute(cudaDevAttrMultiProcessorCount),
                         attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                         generic || major < 9 ? 1
                         : major == 9         ? 16
                                              : 8};
  return known[index] = device;
}

// Lets a kernel have all the dynamic shared memory that a block can have.
inline void allow_shared(const void* kernel, const Device& device) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const int most = int(device.shared_limit) - int(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "cudaFuncSetAttribute");
}

// Asks the driver for that once for each kernel on the current device.
inline void allow_shared_once(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.count({kernel, device}) != 0) return;
  allow_shared(kernel, device_at(device));
  known.emplace(kernel, device);
}

// Whether every row starts on 16 bytes.
inline bool is_wide(const void* data, int64_t rows, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || stride * size % 16 == 0);
}

// Runs kernel(args) with one group for each row; args.first_row is set here, and the launch is cut
// where the grid would be too large.
template <class L, class Args>
void launch(void (*kernel)(Args), Args args, int64_t rows, int64_t shared, void* stream) {
  constexpr int64_t kBlocks = 0x7fffffff, kDefault = 48 * 1024;
  if (shared + int64_t(sizeof(typename L::Group::Storage)) > kDefault) {
    allow_shared_once(reinterpret_cast<const void*>(kernel));
  }
  for (int64_t first = 0; first < rows; first += kBlocks * L::rows_per_block) {
    args.first_row = first;
    const int64_t blocks = (rows - first + L::rows_per_block - 1) / L::rows_per_block;
    void* pointers[] = {&args};
    check(cudaLaunchKernel(kernel, dim3(unsigned(std::min(blocks, kBlocks))), dim3(L::block),
                           pointers, size_t(shared), static_cast<cudaStream_t>(stream)),
          "kernel launch");
  }
}

}  // namespace softtopk::cuda
