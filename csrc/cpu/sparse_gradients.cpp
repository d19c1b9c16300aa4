// The entries of a code by latent, and what each latent gathers from their rows: its gradients.
//
// A latent's entries are summed in their order, a fixed number at a time; one that has more than
// that is several tasks, whose sums wait in the workspace until the last of them is done and are
// then added up in order. So no bit depends on the number of threads, and no thread waits for the
// few latents that are active in every row.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "rows.h"

namespace softtopk::cpu {
namespace {

// The gradient of a whole weight is memory that has just been asked for: the page faults of 50 MB
// take a core 19 ms, with pages of 2 MB 7 ms. Where the system has none, nothing changes.
void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t size) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + size) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

constexpr int64_t kEntriesPerTask = 512;
constexpr int64_t kLatentsPerTask = 8;

// Of a latent's entries, or of some of them.
struct Totals {
  double scale, part;  // sums of scale, and of scale times the dot product
};

template <typename T>
struct Gather {
  const T* scale;
  const int32_t *offsets, *entries;
  int64_t max_active, d;
  const void *y, *weight;
  Type type, out_type;
  bool project, zero_silent;
  void* grad;
  T *dots, *sums, *squares;

  const void* weight_row(int64_t latent) const {
    if (weight == nullptr) return nullptr;
    return static_cast<const char*>(weight) + latent * d * element_size(type);
  }

  // Adds the entries from first to last in place to sum (d,).
  Totals add(int64_t latent, int64_t first, int64_t last, T* sum) const {
    constexpr int64_t size = 64;
    Totals totals{0, 0};
    for (; first < last; first += size) {
      const int64_t count = std::min(size, last - first);
      const int32_t* const places = entries + first;
      int32_t rows[size];
      T scales[size], products[size];
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = static_cast<int32_t>(places[i] / max_active);
        scales[i] = scale[places[i]];
        totals.scale += scales[i];
      }
      sweeps<T>(type).accumulate(y, d, rows, scales, count, weight_row(latent), sum, products);
      if (weight == nullptr) continue;
      for (int64_t i = 0; i < count; ++i) {
        dots[places[i]] = products[i];
        totals.part += static_cast<double>(scales[i]) * products[i];
      }
    }
    return totals;
  }

  void write(int64_t latent, const Totals& totals, T* sum) const {
    if (sums != nullptr) sums[latent] = static_cast<T>(totals.scale);
    if (project || squares != nullptr) {
      const T square = sweeps<T>(type).finish(project ? weight_row(latent) : nullptr,
                                              static_cast<T>(totals.part), d, sum);
      if (squares != nullptr) squares[latent] = square;
    }
    sweeps<T>(out_type).write(sum, nullptr, d, grad_row(latent));
  }

  void write_silent(int64_t latent) const {
    if (sums != nullptr) sums[latent] = 0;
    if (squares != nullptr) squares[latent] = 0;
    if (zero_silent) std::memset(grad_row(latent), 0, d * element_size(out_type));
  }

  void* grad_row(int64_t latent) const {
    return static_cast<char*>(grad) + latent * d * element_size(out_type);
  }
};

// Some of the entries of a latent that has more than a task's.
struct Part {
  int64_t hot, first, last;
};

struct Hot {
  int64_t latent, first_part, parts;
};

struct Parts {
  std::vector<Hot> hot;
  std::vector<Part> parts;

  Parts(const int32_t* offsets, int64_t n) {
    for (int64_t latent = 0; latent < n; ++latent) {
      const int64_t first = offsets[latent], last = offsets[latent + 1];
      if (last - first <= kEntriesPerTask) continue;
      hot.push_back({latent, static_cast<int64_t>(parts.size()), 0});
      for (int64_t i = first; i < last; i += kEntriesPerTask)
        parts.push_back(
            {static_cast<int64_t>(hot.size()) - 1, i, std::min(i + kEntriesPerTask, last)});
      hot.back().parts = static_cast<int64_t>(parts.size()) - hot.back().first_part;
    }
  }
};

template <typename T>
void gather(const Gather<T>& g, int64_t n, T* partial, int threads) {
  const Parts split(g.offsets, n);
  const int64_t parts = split.parts.size(), groups = (n + kLatentsPerTask - 1) / kLatentsPerTask;
  std::vector<Totals> totals(parts);
  std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[split.hot.size()]);
  for (size_t i = 0; i < split.hot.size(); ++i) left[i] = split.hot[i].parts;
  std::vector<T> memory(std::max(threads, 1) * g.d);

  const auto part = [&](int64_t i) {
    const Part& p = split.parts[i];
    const Hot& hot = split.hot[p.hot];
    T* const own = partial + i * g.d;
    std::fill_n(own, g.d, T(0));
    totals[i] = g.add(hot.latent, p.first, p.last, own);
    if (left[p.hot].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    T* const sum = partial + hot.first_part * g.d;
    Totals& total = totals[hot.first_part];
    for (int64_t j = hot.first_part + 1; j < hot.first_part + hot.parts; ++j) {
      for (int64_t c = 0; c < g.d; ++c) sum[c] += partial[j * g.d + c];
      total.scale += totals[j].scale, total.part += totals[j].part;
    }
    g.write(hot.latent, total, sum);
  };
  const auto group = [&](int64_t i, T* sum) {
    const int64_t end = std::min(n, (i + 1) * kLatentsPerTask);
    for (int64_t latent = i * kLatentsPerTask; latent < end; ++latent) {
      const int64_t first = g.offsets[latent], last = g.offsets[latent + 1];
      if (last - first > kEntriesPerTask) continue;
      if (last == first) {
        g.write_silent(latent);
        continue;
      }
      std::fill_n(sum, g.d, T(0));
      const Totals total = g.add(latent, first, last, sum);
      g.write(latent, total, sum);
    }
  };
  for_tasks(parts + groups, 1, (n + g.offsets[n]) * g.d, threads, [&](int64_t task, int worker) {
    if (task < parts)
      part(task);
    else
      group(task - parts, memory.data() + worker * g.d);
  });
}

}  // namespace

int64_t transpose_workspace(int64_t, int64_t, int64_t) { return 0; }

// A counting sort. While it runs, offsets[l + 1] is where the next entry of latent l belongs.
void transpose(const int32_t* indices, const int32_t* counts, int64_t rows, int64_t max_active,
               int64_t n, int32_t* offsets, int32_t* entries, void*, int) {
  const auto for_entries = [&](auto f) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < std::min<int64_t>(counts[row], max_active); ++j)
        f(indices[row * max_active + j], static_cast<int32_t>(row * max_active + j));
  };
  std::fill_n(offsets, n + 1, 0);
  for_entries([&](int32_t latent, int32_t) { ++offsets[latent + 1]; });
  int32_t before = 0;
  for (int64_t latent = 0; latent < n; ++latent) {
    const int32_t count = offsets[latent + 1];
    offsets[latent + 1] = before;
    before += count;
  }
  for_entries([&](int32_t latent, int32_t entry) { entries[offsets[latent + 1]++] = entry; });
}

int64_t gradients_workspace(Type type, int64_t rows, int64_t max_active, int64_t, int64_t d, bool,
                            bool) {
  // Every part but a latent's last is full, and a latent that is split has at least one such.
  return 2 * (rows * max_active / kEntriesPerTask) * d * (type == Type::float64 ? 8 : 4);
}

void latent_gradients(const void* scale, const int32_t*, const int32_t* offsets,
                      const int32_t* entries, int64_t rows, int64_t max_active, int64_t n,
                      int64_t d, const void* y, const void* weight, Type type, Type out_type,
                      bool project, bool zero_silent, void* grad, void* dots, void* sums,
                      void* squares, void* workspace, int threads) {
  with_compute_type(type, [&](auto zero) {
    using T = decltype(zero);
    use_huge_pages(grad, n * d * element_size(out_type));
    if (weight != nullptr) std::fill_n(static_cast<T*>(dots), rows * max_active, T(0));
    gather<T>({static_cast<const T*>(scale), offsets, entries, max_active, d, y, weight, type,
               out_type, project, zero_silent, grad, static_cast<T*>(dots), static_cast<T*>(sums),
               static_cast<T*>(squares)},
              n, static_cast<T*>(workspace), threads);
  });
}

}  // namespace softtopk::cpu
