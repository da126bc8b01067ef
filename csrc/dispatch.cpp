// Which kernels this machine runs: the CPU is looked at here and nowhere else.
#include <cstring>

#include "kernels.h"

namespace octavo {

extern const KernelTable kTableScalar;
extern const KernelTable kTableAvx2;
extern const KernelTable kTableAvx512;
namespace avxvnni {
void linear(const LinearArgs* args, int64_t panel_begin, int64_t panel_end);
}

namespace {

#if defined(OCTAVO_HAS_AVX512)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

// AVX2's kernels, but for the one that multiplies 8-bit integers.
const KernelTable& table_avxvnni() {
  static const KernelTable table = [] {
    KernelTable copy = kTableAvx2;
    copy.isa = "avxvnni";
    copy.linear = avxvnni::linear;
    return copy;
  }();
  return table;
}

bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

}  // namespace

const KernelTable* kernel_table(const char* isa_or_null) {
  const auto wanted = [&](const char* name) { return isa_or_null == nullptr || std::strcmp(isa_or_null, name) == 0; };
#if defined(OCTAVO_HAS_AVX512)
  if (wanted("avx512") && has_avx512()) return &kTableAvx512;
  if (wanted("avxvnni") && has_avxvnni()) return &table_avxvnni();
  if (wanted("avx2") && has_avx2()) return &kTableAvx2;
#endif
  if (wanted("scalar")) return &kTableScalar;
  return nullptr;
}

}  // namespace octavo
