// Threads for the loops over rows and over the pieces of a row.
#pragma once

#include <atomic>
#include <cfenv>
#include <cstdint>
#include <functional>

namespace softtopk::cpu {

// The default floating-point environment while it lives: torch.set_flush_denormal, or a caller's
// rounding mode, would change results, and a search that steps to the next number might stand
// still.
class DefaultEnvironment {
 public:
  DefaultEnvironment() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultEnvironment() { std::fesetenv(&before_); }
  DefaultEnvironment(const DefaultEnvironment&) = delete;

 private:
  std::fenv_t before_;
};

// Calls work(), which must not throw, on up to `threads` threads at once, the calling one among
// them, and returns when all have returned. work() shares out its pieces itself: there may be fewer
// threads, down to one where the number of elements is not worth waking more. Any thread may call
// this at any time, in a forked child too.
void on_threads(int threads, int64_t elements, const std::function<void()>& work);

// Threads that do one job after another together. The one that leads waits for nobody who has not
// begun a piece: where other processes take the cores, a barrier for every sweep of a row would
// cost a time slice each.
class Team {
 public:
  // Calls lead(team) on one of up to `threads` threads, while the others help with its jobs.
  static void run(int threads, int64_t elements, const std::function<void(Team&)>& lead);

  // piece(i) for every i in [0, count), count < 2^32; for the leader alone.
  void share(int64_t count, const std::function<void(int64_t)>& piece);

 private:
  Team() = default;
  bool work();
  void help();

  const std::function<void(int64_t)>* piece_ = nullptr;
  int64_t count_ = 0;
  // The number of the job in the upper half, in the lower how many of its pieces nobody has taken:
  // who takes one knows that the job is still the one it has read.
  std::atomic<uint64_t> state_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<bool> over_{false};
};

}  // namespace softtopk::cpu
