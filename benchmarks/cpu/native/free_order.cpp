// What kernels reach that may add in any order, to show what the one fixed order of csrc/ costs. For benchmarks alone.
//
//   free_order linear ROWS N K           -> seconds of a product with 4-bit codes, float16 scales and minimums (Q4_1)
//   free_order attention SEQS TOKENS HEADS KV_HEADS HEAD_DIM  -> seconds of a decode step's attention over float16 K, V
//
// One line of JSON: {"variant": seconds, ...}. Each variant is one way to break up a row's sum: so many chains of sums,
// which the processor can advance together, added at the end. The data have the sizes and the layout of csrc/'s (panels
// of 32 columns, nibbles of four k's together; blocks of 16 tokens, K as [head_dim][16]) and rotate through copies larger
// than the caches. One thread, its own clock, best of several runs. Compiled with one of OCTAVO_ISA_*, like a kernel.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#include "dot.h"

namespace octavo {
namespace OCTAVO_NS {
namespace {

constexpr int64_t kGroup = 32, kColumns = 32, kBlock = 16, kAhead = 4096;
constexpr size_t kRotate = size_t{64} << 20;

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

template <typename Work>
double best_of(Work&& work) {
  double best = 1e9, total = 0;
  for (int run = 0; run < 3 || (total < 0.3 && run < 200); ++run) {
    const double start = now();
    work();
    const double taken = now() - start;
    best = std::min(best, taken);
    total += taken;
  }
  return best;
}

template <typename T>
T* make(size_t count) {
  const size_t size = (count * sizeof(T) + kAhead * 2 + 63) / 64 * 64;
  T* data = static_cast<T*>(std::aligned_alloc(64, size));
  std::memset(static_cast<void*>(data), 0x21, size);  // float16 0.01, float32 5e-19, nibbles 1 and 2
  return data;
}

// ---- linear ------------------------------------------------------------------------------------------------------

struct Weights {
  const uint8_t* codes;     // [panels][k / 4][64]
  const uint16_t* scales;   // [panels][groups][32]
  const uint16_t* minimums;
};
struct Rows {
  const int8_t* codes;  // [rows][k]
  const float* scales;  // [rows][groups]
  const float* sums;    // [rows][groups], scale * sum
};

// kRows rows of a panel; group g goes to chain g % kChains.
template <int kRows, int kChains>
void tile(const Weights& w, const Rows& x, int64_t groups, const float* residual, float* out, int64_t stride) {
  f32x16 c[kChains][kRows][2];
  for (int s = 0; s < kChains; ++s) {
    for (int i = 0; i < kRows; ++i) c[s][i][0] = c[s][i][1] = set1(0.0f);
  }
  const int64_t k = groups * kGroup;
  for (int64_t first = 0; first < groups; first += kChains) {
    _Pragma("GCC unroll 4") for (int s = 0; s < kChains; ++s) {
      const int64_t g = first + s;
      if (g >= groups) break;
      sums total[kRows][2];
      for (int i = 0; i < kRows; ++i) total[i][0] = total[i][1] = no_sums();
      const uint8_t* codes = w.codes + g * (kGroup / 4) * 64;
      _Pragma("GCC unroll 8") for (int q = 0; q < kGroup / 4; ++q) {
        __builtin_prefetch(codes + q * 64 + kAhead);
        const u8x64 packed = load_u8(codes + q * 64), low = move_bits<0, 0, 15>(packed), high = move_bits<4, 0, 15>(packed);
        _Pragma("GCC unroll 8") for (int i = 0; i < kRows; ++i) {
          const u8x64 four = broadcast_x4(x.codes + i * k + g * kGroup + 4 * q);
          total[i][0] = add_products<false>(total[i][0], low, four);
          total[i][1] = add_products<false>(total[i][1], high, four);
        }
      }
      _Pragma("GCC unroll 2") for (int h = 0; h < 2; ++h) {
        const f32x16 scale = load_f16(w.scales + g * kColumns + h * kLanes);
        const f32x16 minimum = load_f16(w.minimums + g * kColumns + h * kLanes);
        _Pragma("GCC unroll 8") for (int i = 0; i < kRows; ++i) {
          const f32x16 sum = to_f32(last_sums<false>(total[i][h]));
          c[s][i][h] = fma(sum, scale * set1(x.scales[i * groups + g]), c[s][i][h]);
          c[s][i][h] = fma(minimum, set1(x.sums[i * groups + g]), c[s][i][h]);
        }
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int h = 0; h < 2; ++h) {
      f32x16 total = c[0][i][h];
      for (int s = 1; s < kChains; ++s) total = total + c[s][i][h];
      store(out + i * stride + h * kLanes, total + load(residual + i * stride + h * kLanes));
    }
  }
}

template <int kRows, int kChains>
void panel(const Weights& w, Rows x, int64_t rows, int64_t groups, const float* residual, float* out, int64_t stride) {
  for (; rows > 0; rows -= kRows) {
    if (rows < kRows) return panel<(kRows > 1 ? kRows - 1 : 1), kChains>(w, x, rows, groups, residual, out, stride);
    tile<kRows, kChains>(w, x, groups, residual, out, stride);
    x.codes += kRows * groups * kGroup;
    x.scales += kRows * groups;
    x.sums += kRows * groups;
    residual += kRows * stride;
    out += kRows * stride;
  }
}

template <int kRows, int kChains>
void time_linear(const char* comma, int64_t rows, int64_t n, int64_t k) {
  const int64_t panels = n / kColumns, groups = k / kGroup;
  const auto code_bytes = static_cast<size_t>(n * k / 2), scales = static_cast<size_t>(n * groups);
  const size_t copies = kRotate / (code_bytes + 4 * scales) + 1;
  auto* codes = make<uint8_t>(code_bytes * copies);
  auto* scale = make<uint16_t>(scales * copies);
  auto* minimum = make<uint16_t>(scales * copies);
  const Rows x = {make<int8_t>(static_cast<size_t>(rows * k)), make<float>(static_cast<size_t>(rows * groups)),
                  make<float>(static_cast<size_t>(rows * groups))};
  auto* out = make<float>(static_cast<size_t>(2 * rows * n));  // each product adds the one before, as in operators.py
  const double seconds = best_of([&] {
    for (size_t copy = 0; copy < copies; ++copy) {
      const int64_t from = copy % 2 == 0 ? 0 : rows * n, to = rows * n - from;
      for (int64_t p = 0; p < panels; ++p) {
        const auto at = static_cast<int64_t>(copy) * panels + p;
        const Weights w = {codes + at * (k / 4) * 64, scale + at * groups * kColumns, minimum + at * groups * kColumns};
        panel<kRows, kChains>(w, x, rows, groups, out + from + p * kColumns, out + to + p * kColumns, n);
      }
    }
  });
  std::printf("%s\"%d rows, %d chains\": %.9f", comma, kRows, kChains, seconds / static_cast<double>(copies));
  for (const void* data : {static_cast<const void*>(codes), static_cast<const void*>(scale),
                           static_cast<const void*>(minimum), static_cast<const void*>(x.codes),
                           static_cast<const void*>(x.scales), static_cast<const void*>(x.sums),
                           static_cast<const void*>(out)}) {
    std::free(const_cast<void*>(data));
  }
}

void linear(int64_t rows, int64_t n, int64_t k) {
  time_linear<1, 2>("", rows, n, k);
  time_linear<1, 4>(", ", rows, n, k);
  if (rows == 1) return;
  time_linear<2, 1>(", ", rows, n, k);
  time_linear<2, 2>(", ", rows, n, k);
  time_linear<3, 1>(", ", rows, n, k);
#if defined(OCTAVO_ISA_AVX512)
  time_linear<4, 2>(", ", rows, n, k);
  time_linear<6, 1>(", ", rows, n, k);
#endif
}

// ---- attention -----------------------------------------------------------------------------------------------------

constexpr int64_t kMostTokens = 4096, kMostDim = 256;

// One token's rows of a kv head: all scores, one maximum, one pass over V. Sums over head_dim go to kChains chains, sums
// over tokens too.
template <int kRows, int kChains>
void decode(const float* query, const uint16_t* k, const uint16_t* v, int64_t tokens, int64_t head_dim, int64_t stride,
            float* out) {
  static float weights[kRows][kMostTokens];
  const int64_t blocks = (tokens + kBlock - 1) / kBlock;
  f32x16 top[kRows], sum[kRows];
  for (int r = 0; r < kRows; ++r) {
    top[r] = set1(-1e30f);
    sum[r] = set1(0.0f);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const uint16_t* block = k + b * stride;
    for (int64_t i = 0; i < kBlock * head_dim; i += 32) __builtin_prefetch(block + stride + i);
    f32x16 score[kRows][kChains];
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kChains; ++s) score[r][s] = set1(0.0f);
    }
    for (int64_t d = 0; d < head_dim; d += kChains) {
      _Pragma("GCC unroll 4") for (int s = 0; s < kChains; ++s) {
        const f32x16 key = load_f16(block + (d + s) * kBlock);
        _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r) {
          score[r][s] = fma(set1(query[r * head_dim + d + s]), key, score[r][s]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      f32x16 total = score[r][0];
      for (int s = 1; s < kChains; ++s) total = total + score[r][s];
      store(weights[r] + b * kBlock, total);
      top[r] = max(total, top[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const f32x16 most = set1(hmax(top[r]));
    for (int64_t t = 0; t < blocks * kBlock; t += kLanes) {
      const f32x16 weight = exp(load(weights[r] + t) - most);
      store(weights[r] + t, weight);
      sum[r] = sum[r] + weight;
    }
  }
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    f32x16 value[kRows][kChains];
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kChains; ++s) value[r][s] = set1(0.0f);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const uint16_t* block = v + b * stride + d;
      for (int64_t t = 0; t < kBlock; t += kChains) {
        _Pragma("GCC unroll 4") for (int s = 0; s < kChains; ++s) {
          const f32x16 row = load_f16(block + (t + s) * head_dim);
          _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r) {
            value[r][s] = fma(set1(weights[r][b * kBlock + t + s]), row, value[r][s]);
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      f32x16 total = value[r][0];
      for (int s = 1; s < kChains; ++s) total = total + value[r][s];
      store(out + r * head_dim + d, total / set1(hsum(sum[r])));
    }
  }
}

struct Decode {
  int64_t sequences, tokens, heads, kv_heads, head_dim;
};

template <int kRows, int kChains>
void time_decode(const char* comma, const Decode& d) {
  const int64_t group = d.heads / d.kv_heads, blocks = (d.tokens + kBlock - 1) / kBlock;
  const int64_t block = kBlock * d.head_dim, stride = block * d.kv_heads;
  const auto elements = static_cast<size_t>(d.sequences * blocks * stride);
  const size_t copies = kRotate / (4 * elements) + 1;
  auto* k = make<uint16_t>(elements * copies + static_cast<size_t>(stride));
  auto* v = make<uint16_t>(elements * copies + static_cast<size_t>(stride));
  auto* query = make<float>(static_cast<size_t>((group + kRows) * d.head_dim));
  auto* out = make<float>(static_cast<size_t>((group + kRows) * d.head_dim));
  const double seconds = best_of([&] {
    for (size_t copy = 0; copy < copies; ++copy) {
      for (int64_t s = 0; s < d.sequences; ++s) {
        for (int64_t head = 0; head < d.kv_heads; ++head) {
          const int64_t at = static_cast<int64_t>(copy * elements) + s * blocks * stride + head * block;
          for (int64_t r = 0; r < group; r += kRows) {
            decode<kRows, kChains>(query + r * d.head_dim, k + at, v + at, d.tokens, d.head_dim, stride,
                                   out + r * d.head_dim);
          }
        }
      }
    }
  });
  std::printf("%s\"%d rows, %d chains\": %.9f", comma, kRows, kChains, seconds / static_cast<double>(copies));
  std::free(k);
  std::free(v);
  std::free(query);
  std::free(out);
}

void attention(const Decode& d) {
  const int64_t group = d.heads / d.kv_heads;
  time_decode<1, 4>("", d);
  if (group % 2 == 0) time_decode<2, 2>(", ", d);
  if (group % 2 == 0) time_decode<2, 4>(", ", d);
  if (group % 3 == 0) time_decode<3, 2>(", ", d);
  if (group % 4 == 0) time_decode<4, 1>(", ", d);
  if (group % 4 == 0) time_decode<4, 2>(", ", d);
  if (group % 7 == 0) time_decode<7, 1>(", ", d);
}

}  // namespace
}  // namespace OCTAVO_NS
}  // namespace octavo

int main(int argc, char** argv) {
  using namespace octavo::OCTAVO_NS;
  std::vector<int64_t> n;
  for (int i = 2; i < argc; ++i) n.push_back(std::atoll(argv[i]));
  const std::string what = argc > 1 ? argv[1] : "";
  std::printf("{");
  if (what == "linear" && n.size() == 3 && n[1] % kColumns == 0 && n[2] % kGroup == 0) {
    linear(n[0], n[1], n[2]);
  } else if (what == "attention" && n.size() == 5 && n[1] <= kMostTokens - kBlock && n[4] <= kMostDim) {
    attention({n[0], n[1], n[2], n[3], n[4]});
  } else {
    std::fprintf(stderr, "free_order linear ROWS N K | attention SEQS TOKENS HEADS KV_HEADS HEAD_DIM\n");
    return 2;
  }
  std::printf("}\n");
}
