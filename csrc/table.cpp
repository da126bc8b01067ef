// The table of the instruction set being compiled. Plain data: no constructor runs before dispatch.cpp has looked at the CPU.
#include "kernel_functions.h"

namespace octavo {

#if defined(OCTAVO_ISA_AVX512)
extern const KernelTable kTableAvx512;
#define OCTAVO_TABLE kTableAvx512
#define OCTAVO_NAME "avx512"
#elif defined(OCTAVO_ISA_AVX2)
extern const KernelTable kTableAvx2;
#define OCTAVO_TABLE kTableAvx2
#define OCTAVO_NAME "avx2"
#else
extern const KernelTable kTableScalar;
#define OCTAVO_TABLE kTableScalar
#define OCTAVO_NAME "scalar"
#endif

const KernelTable OCTAVO_TABLE = {
    .isa = OCTAVO_NAME,
    .quantize_rows = OCTAVO_NS::quantize_rows,
    .linear = OCTAVO_NS::linear,
    .embed_row = OCTAVO_NS::embed_row,
    .rms_norm = OCTAVO_NS::rms_norm,
    .rope = OCTAVO_NS::rope,
    .write_kv = OCTAVO_NS::write_kv,
    .attention = OCTAVO_NS::attention,
    .attention_segment = OCTAVO_NS::attention_segment,
    .attention_merge = OCTAVO_NS::attention_merge,
    .silu_mul = OCTAVO_NS::silu_mul,
    .gelu_mul = OCTAVO_NS::gelu_mul,
    .scale = OCTAVO_NS::scale,
    .add = OCTAVO_NS::add,
    .sample = OCTAVO_NS::sample,
};

}  // namespace octavo
