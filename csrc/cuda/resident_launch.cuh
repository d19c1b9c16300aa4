// From the host to the kernels of resident rows: how many blocks share a row, and the launch.
#pragma once

#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "launch.cuh"
#include "resident.cuh"

namespace softtopk::cuda {

// How rows are laid out on chip.
struct Plan {
  int blocks = 0;      // that share a row; 0: it does not fit
  int threads = 0;     // of a block
  int room = 0;        // floats of a block besides its part of the row
  int64_t shared = 0;  // bytes of dynamic shared memory
};

constexpr int64_t kAnyPart = int64_t(1) << 40;  // bytes: more than any part has

// What a kernel asks of its plan.
struct Demand {
  int arrays;      // rows at a time
  int64_t part;    // the most bytes of a block's part of them, where a cluster can be larger
  int resident;    // blocks of 256 threads on a multiprocessor that there are registers for
  int threads[3];  // of a block alone with up to 512, 1024, 2048 chunks; 256 in all others
  int room[3];     // of a block alone with up to 512, 1024, more chunks
  int room_of_cluster;
};

// How many blocks share a row, a power of two: speed follows the bytes of rows that a
// multiprocessor holds, for while one block works on its row the others' come. Forward, float32,
// alpha = 1e-2, as a fraction of the floor: 192 KiB 0.75 to 0.87, 160 0.71 to 0.74, 144 0.63 to
// 0.69, 120 0.56. So a row of 24576 is one block's (0.87; two blocks' 0.70), and one of 50256 two
// blocks' (0.76; four blocks' 0.63). Of equals the fewest blocks. Clusters of 3, 5 or 7 do not fill
// the chip (50256 in three blocks: 0.57), those of 6 were no better than of 4.
inline Plan plan_resident(int64_t n, int64_t size, const Demand& demand, const Device& device) {
  constexpr int64_t kOther = 2304;  // bytes of shared memory that a block has besides
  const int64_t chunks = (n * size + 15) / 16;
  Plan plan;
  int64_t most = -1;
  for (int blocks = 1; blocks <= device.cluster_blocks; blocks *= 2) {
    const int64_t each = (chunks + blocks - 1) / blocks;
    const bool alone = blocks == 1, small = alone && each <= 2048;
    const int length = each <= 512 ? 0 : each <= 1024 ? 1 : 2;
    const int threads = small ? demand.threads[length] : 256;
    const int64_t items = (each + threads - 1) / threads;
    const int64_t slot = items * (threads * 16 + (alone ? 0 : 16)) + 16;
    const int room = alone ? demand.room[length] : demand.room_of_cluster;
    const int64_t shared = demand.arrays * slot + 4 * room;
    if (shared + 4096 > device.shared_limit || items > kMostItems) continue;
    const int64_t part = demand.arrays * each * 16;
    const int64_t resident =
        std::min<int64_t>(demand.resident, device.shared_limit / (shared + kOther));
    // Where no part is as small as is asked for, the smallest will do.
    const int64_t on_chip = part > demand.part ? 0 : resident * part;
    if (on_chip > most || most == 0) {
      plan = {blocks, threads, room, shared};
      most = on_chip;
    }
    if (small) break;
  }
  return plan;
}

// The grid that fills the device, at most `rows` clusters. Asked of the driver once for each kernel
// and plan.
inline int64_t resident_blocks(const void* kernel, const Plan& plan,
                               const cudaLaunchConfig_t& config, const Device& device) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int64_t, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& clusters = known[{kernel, plan.threads * 32 + plan.blocks, plan.shared, device.index}];
  if (clusters == 0) {
    allow_shared(kernel, device);  // for every plan
    if (plan.blocks > 8) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            "cudaFuncSetAttribute");
    }
    if (plan.blocks > 1) {
      check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config),
            "cudaOccupancyMaxActiveClusters");
    } else {
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, kernel, plan.threads,
                                                          size_t(plan.shared)),
            "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
      clusters *= device.multiprocessors;
    }
    if (clusters == 0) throw std::runtime_error("softtopk: a kernel does not fit on this GPU");
  }
  return clusters;
}

// Runs kernel(args) with as many clusters as fit, which share out the rows. If it `overlaps` the
// kernel before, it waits for it itself (griddepcontrol.wait).
template <class Args>
void launch_resident(void (*kernel)(Args), Args args, int64_t rows, const Plan& plan,
                     const Device& device, void* stream, bool overlaps = false) {
  if (rows == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(plan.blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  if (overlaps) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(plan.blocks));
  config.blockDim = dim3(unsigned(plan.threads));
  config.dynamicSmemBytes = size_t(plan.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = plan.blocks > 1 || overlaps ? 1 : 0;
  const int64_t clusters = std::min(rows, resident_blocks(function, plan, config, device));
  config.gridDim = dim3(unsigned(clusters * plan.blocks));
  void* pointers[] = {&args};
  check(cudaLaunchKernelExC(&config, function, pointers), "kernel launch");
}

// Calls f(H) for the Sharing of a plan, whose blocks of no cluster have one of THREADS threads.
template <class S, int... THREADS, class F>
void with_sharing(const Plan& plan, int64_t n, F f) {
  const auto with_ragged = [&](auto ragged) {
    constexpr bool kRagged = decltype(ragged)::value;
    if (plan.blocks > 1) return f(Sharing<S, Cluster, 256, kRagged>());
    ((plan.threads == THREADS ? f(Sharing<S, NoCluster, THREADS, kRagged>()) : void()), ...);
  };
  n % Chunk<S>::size != 0 ? with_ragged(std::true_type()) : with_ragged(std::false_type());
}

}  // namespace softtopk::cuda
