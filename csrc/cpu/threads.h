// Threads for the loops over rows and over the pieces of a row.
#pragma once

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

}  // namespace softtopk::cpu
