// Threads for the loop over rows.
#pragma once

#include <cstdint>
#include <functional>

namespace softtopk::cpu {

// Calls work(), which must not throw, on up to `threads` threads at once, the calling one among
// them, and returns when all have returned. work() shares out its pieces itself: there may be fewer
// threads, down to one where the number of elements is not worth waking more. Any thread may call
// this at any time, in a forked child too.
void on_threads(int threads, int64_t elements, const std::function<void()>& work);

}  // namespace softtopk::cpu
