// Which of the compiled sets of sweeps this processor runs.
//
// The environment variable SOFTTOPK_CPU_ISA (baseline, avx2 or avx512) can ask for a smaller set
// than the processor has, so that every set can be tested on one machine.
#include <cstdlib>
#include <cstring>

#include "sweeps.h"

namespace softtopk::cpu {

struct Tables {
  const Sweeps<float>&float32, &float16, &bfloat16;
  const Sweeps<double>& float64;
};

#define SOFTTOPK_TABLES(isa)                                                           \
  namespace isa {                                                                      \
  extern const Sweeps<float> from_float32;                                             \
  extern const Sweeps<float> from_float16;                                             \
  extern const Sweeps<float> from_bfloat16;                                            \
  extern const Sweeps<double> from_float64;                                            \
  static const Tables tables{from_float32, from_float16, from_bfloat16, from_float64}; \
  }

SOFTTOPK_TABLES(baseline)
#ifdef SOFTTOPK_X86
SOFTTOPK_TABLES(avx2)
SOFTTOPK_TABLES(avx512)
#endif

namespace {

const Tables& choose() {
#ifdef SOFTTOPK_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* asked = std::getenv("SOFTTOPK_CPU_ISA");
  const bool baseline_asked = asked && std::strcmp(asked, "baseline") == 0;
  const bool avx2_asked = asked && std::strcmp(asked, "avx2") == 0;
  if (has_avx512 && !baseline_asked && !avx2_asked) return avx512::tables;
  if (has_avx2 && !baseline_asked) return avx2::tables;
#endif
  return baseline::tables;
}

// Chosen when the module is loaded: a choice at the first call could be going on in one thread
// while another forks, and the child would wait for it.
const Tables& chosen = choose();

}  // namespace

template <>
const Sweeps<float>& sweeps<float>(Type type) {
  if (type == Type::float16) return chosen.float16;
  if (type == Type::bfloat16) return chosen.bfloat16;
  return chosen.float32;
}

template <>
const Sweeps<double>& sweeps<double>(Type) {
  return chosen.float64;
}

}  // namespace softtopk::cpu
