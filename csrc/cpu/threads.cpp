// The threads are OpenMP's, which torch uses too: threads of our own would have to wait for a core
// while torch's idle ones spin. On 2 cores, one torch operation and 64 rows of 4096 in turn take
// 0.63 ms with OpenMP, 1.13 ms with a pool on a condition variable, 1.44 ms with threads started
// for the call, 1.09 ms on one thread.
//
// But GNU's OpenMP waits for ever in a forked child for the threads of its parent. So there, and
// where there is no OpenMP, threads are started for the call.
#include "threads.h"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#endif

namespace softtopk::cpu {
namespace {

// Joins on leaving; a thread that the system refuses is done without.
void on_started_threads(int threads, const std::function<void()>& work) {
  std::vector<std::thread> started;
  started.reserve(std::max(threads - 1, 0));
  try {
    for (int i = 1; i < threads; ++i) started.emplace_back(std::ref(work));
  } catch (const std::system_error&) {
  }
  work();
  for (std::thread& thread : started) thread.join();
}

#ifdef _OPENMP
// Whether this process was forked and has executed no program since: PF_FORKNOEXEC among the flags
// of /proc/self/stat on Linux. torch may have used OpenMP before the fork and this module have been
// loaded after it.
bool loaded_in_child() {
  constexpr unsigned fork_without_exec = 0x40;
  char text[1024] = {};
  if (std::FILE* stat = std::fopen("/proc/self/stat", "r")) {
    text[std::fread(text, 1, sizeof text - 1, stat)] = 0;
    std::fclose(stat);
  }
  const char* name_end = std::strrchr(text, ')');
  unsigned flags = 0;
  if (name_end) std::sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %u", &flags);
  return flags & fork_without_exec;
}

std::atomic<bool> in_child{loaded_in_child()};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { in_child = true; });
#endif

}  // namespace

void on_threads(int threads, int64_t elements, const std::function<void()>& work) {
#ifdef _OPENMP
  if (!in_child) {
    // `threads` or one: GNU's OpenMP ends those of torch's threads that a smaller team leaves out.
#pragma omp parallel num_threads(threads) if (elements > 16384)
    work();
    return;
  }
#endif
  on_started_threads(static_cast<int>(std::min<int64_t>(threads, elements / 65536)), work);
}

// Returns once f() is true; sweeps take microseconds, so at first without giving up the core.
template <typename F>
static void wait_until(F f) {
  for (int turn = 0; !f(); ++turn)
    if (turn > 4096) std::this_thread::yield();
}

void Team::run(int threads, int64_t elements, const std::function<void(Team&)>& lead) {
  Team team;
  std::atomic<bool> led{false};
  const auto work = [&] {
    const DefaultEnvironment environment;
    if (led.exchange(true)) return team.help();
    lead(team);
    team.over_ = true;
  };
  on_threads(threads, elements, std::ref(work));
}

void Team::share(int64_t count, const std::function<void(int64_t)>& piece) {
  const uint64_t number = (state_.load(std::memory_order_relaxed) >> 32) + 1;
  piece_ = &piece, count_ = count;
  done_.store(0, std::memory_order_relaxed);
  state_.store(number << 32 | static_cast<uint64_t>(count), std::memory_order_release);
  while (work()) {
  }
  wait_until([&] { return done_.load(std::memory_order_acquire) == count; });
}

// Does one piece; false where all are taken.
bool Team::work() {
  uint64_t state = state_.load(std::memory_order_acquire);
  do
    if ((state & 0xffffffff) == 0) return false;
  while (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel,
                                       std::memory_order_acquire));
  (*piece_)(count_ - static_cast<int64_t>(state & 0xffffffff));
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

void Team::help() {
  const auto over = [&] { return over_.load(std::memory_order_acquire); };
  while (!over()) wait_until([&] { return over() || work(); });
}

}  // namespace softtopk::cpu
