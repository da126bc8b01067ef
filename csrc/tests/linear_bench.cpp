// Speed of linear against the limits of the machine, all measured in the same run on one thread: 8-bit dot products a
// second (AVX-512 VNNI where the machine has it) and bytes read a second. Also packing and rounding.
//
// Compile like linear_test.cpp (same directory); run: linear_bench [isa [form [n]]]. Each figure is the best of several
// runs, since the machine may be shared; weights rotate through copies that together exceed the caches.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"

#define OCTAVO_DECLARE(isa)                                                                                        \
  namespace octavo::isa {                                                                                          \
  void quantize_rows(const float* x, int64_t x_stride, int64_t rows, int64_t k, int32_t group, QuantizedRows out); \
  void linear(const LinearArgs* args, int64_t panel_begin, int64_t panel_end);                                     \
  }

OCTAVO_DECLARE(scalar)
#if defined(__x86_64__)
OCTAVO_DECLARE(avx2)
OCTAVO_DECLARE(avx512)
#endif

namespace {

using namespace octavo;

// Time that this thread ran: others may share the machine.
double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

template <typename F>
double best_of(int runs, F&& f) {
  double best = 1e9;
  for (int i = 0; i < runs; ++i) {
    const double start = now();
    f();
    best = std::min(best, now() - start);
  }
  return best;
}

#if defined(__x86_64__)
// Twelve chains of vpdpbusd, in registers whatever the compiler thinks of it.
__attribute__((target("avx512f,avx512vnni"), noinline)) void dot_products(int64_t steps) {
  asm volatile(
      "1:\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm0\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm1\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm2\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm3\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm4\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm5\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm6\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm7\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm8\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm9\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm10\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm11\n\t"
      "dec %0\n\t"
      "jnz 1b"
      : "+r"(steps)
      :
      : "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm30",
        "zmm31", "cc");
}

double int8_limit() {
  const int64_t steps = 2000000;
  const double seconds = best_of(7, [] { dot_products(steps); });
  return static_cast<double>(steps) * 12 * 64 * 2 / seconds / 1e9;
}
#endif

double read_limit() {
  std::vector<uint64_t> data(size_t{96} << 20 >> 3, 1);
  volatile uint64_t sink = 0;
  const double seconds = best_of(12, [&] {
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i < data.size(); i += 32) {
      __builtin_prefetch(data.data() + i + 512);
      __builtin_prefetch(data.data() + i + 520);
      __builtin_prefetch(data.data() + i + 528);
      __builtin_prefetch(data.data() + i + 536);
      for (size_t j = 0; j < 32; j += 4) {
        a += data[i + j];
        b += data[i + j + 1];
        c += data[i + j + 2];
        d += data[i + j + 3];
      }
    }
    sink = sink + a + b + c + d;
  });
  return static_cast<double>(data.size()) * 8 / seconds / 1e9;
}

struct Form {
  const char* name;
  WeightKind kind;
  int group, zero;
  bool scales_f32, minimums;
};

struct Isa {
  const char* name;
  decltype(&scalar::quantize_rows) quantize_rows;
  decltype(&scalar::linear) linear;
};

uint8_t* make(size_t size) {
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64));
  for (size_t i = 0; i < size; ++i) data[i] = static_cast<uint8_t>(i * 7 % 61);
  return data;
}

// Ordinary numbers of one float type: 2**-4 and around.
uint8_t* make_numbers(size_t size, WeightKind type) {
  uint8_t* data = make(size);
  for (size_t i = 0; i + 3 < size; i += 4) {
    uint32_t value = 0x3d800000u + static_cast<uint32_t>(i % 1021) * 1000u;
    if (type == WeightKind::kF16) value = 0x2c002c00u + static_cast<uint32_t>(i % 1021) * 0x00010001u;
    if (type == WeightKind::kBF16) value = 0x3d803d80u + static_cast<uint32_t>(i % 61) * 0x00010001u;
    std::memcpy(data + i, &value, 4);
  }
  return data;
}

void bench_shape(const Isa& isa, const Form& form, int64_t n, int64_t k, double limit, double bandwidth) {
  const bool dense = form.group == 0;
  const int64_t groups = dense ? 0 : k / form.group;
  const auto weights = static_cast<size_t>(n * k);
  const size_t bits = form.kind == WeightKind::kInt4   ? 4
                      : form.kind == WeightKind::kInt8 ? 8
                      : form.kind == WeightKind::kF32  ? 32
                                                       : 16;
  const size_t code_bytes = weights * bits / 8;
  const size_t scale_bytes = static_cast<size_t>(n * groups) * (form.scales_f32 ? 4 : 2);
  const size_t bytes = code_bytes + scale_bytes * (form.minimums ? 2 : 1);
  const auto copies = static_cast<int64_t>(std::max<size_t>(1, (size_t{96} << 20) / bytes));
  const size_t all_codes = code_bytes * static_cast<size_t>(copies),
               all_scales = std::max<size_t>(scale_bytes, 64) * static_cast<size_t>(copies);
  uint8_t* codes = dense ? make_numbers(all_codes, form.kind) : make(all_codes);
  uint8_t* scales = make_numbers(all_scales, form.scales_f32 ? WeightKind::kF32 : WeightKind::kF16);
  for (const int64_t rows : {1, 4, 6, 16, 64, 256}) {
    std::vector<float> x(static_cast<size_t>(rows * k)), out(static_cast<size_t>(rows * n)),
        x_scales(static_cast<size_t>(rows * groups));
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 201) - 100.0f;
    std::vector<int8_t> x_codes(x.size());
    std::vector<int32_t> sums(x_scales.size());
    const QuantizedRows quantized = {x_codes.data(), x_scales.data(), sums.data()};
    if (!dense) isa.quantize_rows(x.data(), k, rows, k, form.group, quantized);
    std::vector<PackedWeight> packed;
    for (int64_t c = 0; c < copies; ++c) {
      uint8_t* s = scales + static_cast<size_t>(c) * scale_bytes;
      packed.push_back({form.kind, n, k, form.group, form.zero, form.scales_f32,
                        codes + static_cast<size_t>(c) * code_bytes, s, form.minimums ? s : nullptr});
    }
    auto* scratch = static_cast<uint8_t*>(std::aligned_alloc(64, linear_scratch_bytes(packed[0])));
    const int64_t reps =
        std::clamp<int64_t>(static_cast<int64_t>(2e9 / (2.0 * static_cast<double>(rows * n * k))), 1, copies);
    int64_t copy = 0;
    const double seconds = best_of(7,
                                   [&] {
                                     for (int64_t r = 0; r < reps; ++r, copy = (copy + 1) % copies) {
                                       LinearArgs args{&packed[static_cast<size_t>(copy)],
                                                       rows,
                                                       x.data(),
                                                       quantized,
                                                       out.data(),
                                                       n,
                                                       nullptr,
                                                       nullptr,
                                                       scratch};
                                       isa.linear(&args, 0, n / kPanel);
                                     }
                                   }) /
                           static_cast<double>(reps);
    const double gops = 2.0 * static_cast<double>(rows * n * k) / seconds / 1e9;
    const double reads = static_cast<double>(bytes) / seconds / 1e9;
    std::printf(
        "%-7s %-10s N %5lld K %4lld M %3lld: %9.1f us %6.0f GOP/s (%3.0f %% of int8) %5.1f GB/s (%3.0f %% of read)\n",
        isa.name, form.name, static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(rows),
        seconds * 1e6, gops, 100 * gops / limit, reads, 100 * reads / bandwidth);
    std::free(scratch);
  }
  std::free(codes);
  std::free(scales);
}

void bench_quantize(const Isa& isa) {
  const int64_t rows = 64, k = 576;
  std::vector<float> x(static_cast<size_t>(rows * k), 0.5f), scales(x.size() / 32);
  std::vector<int8_t> codes(x.size());
  std::vector<int32_t> sums(scales.size());
  const double seconds =
      best_of(200, [&] { isa.quantize_rows(x.data(), k, rows, k, 32, {codes.data(), scales.data(), sums.data()}); });
  std::printf("%s quantize_rows: %.2f ns a group of 32\n", isa.name,
              seconds * 1e9 / static_cast<double>(rows * k / 32));
}

// A stored form of blocks of 32 or 256 elements whose tables look like those of files.
void bench_pack(const char* name, int bits, int block_len, int low_bits, int high_bits, bool pairs, bool f32) {
  const int64_t n = 1536 * 4, k = 1536, blocks = k / block_len;
  std::vector<uint16_t> byte_of[2];
  std::vector<uint8_t> shift_of[2];
  const int plane_bits[2] = {low_bits, high_bits};
  int64_t bytes[2] = {};
  GroupedView view{n, k, 32, bits, 0, high_bits == 0 ? 1 : 2, {}, {}, {}};
  std::vector<uint8_t> data[2];
  for (int p = 0; p < view.num_planes; ++p) {
    bytes[p] = block_len * plane_bits[p] / 8;
    const int run = std::min<int>(block_len == 256 ? 32 : static_cast<int>(bytes[p]), static_cast<int>(bytes[p]));
    for (int e = 0; e < block_len; ++e) {
      const int span = run * (8 / plane_bits[p]), in = e % span;
      const bool neighbours = pairs && p == 1;
      byte_of[p].push_back(static_cast<uint16_t>(neighbours ? e * plane_bits[p] / 8 : e / span * run + in % run));
      shift_of[p].push_back(static_cast<uint8_t>(neighbours ? e * plane_bits[p] % 8 : in / run * plane_bits[p]));
    }
    data[p].assign(static_cast<size_t>(n * blocks * bytes[p]), 0x5a);
    view.planes[p] = {
        data[p].data(), blocks * bytes[p],     bytes[p], 1, byte_of[p].data(), shift_of[p].data(), block_len,
        plane_bits[p],  p == 0 ? 0 : low_bits, 0};
  }
  const int size = f32 ? 4 : 2;
  std::vector<uint8_t> scales(static_cast<size_t>(n * k / 32 * size));
  view.scales = {scales.data(), k / 32 * size, size, f32};
  view.minimums = view.scales;
  const PackedSizes sizes = packed_sizes(view);
  auto* out = static_cast<uint8_t*>(std::aligned_alloc(64, sizes.codes));
  auto* out_scales = std::aligned_alloc(64, sizes.scales);
  auto* out_minimums = std::aligned_alloc(64, sizes.minimums);
  PackedWeight packed = describe(view, out, out_scales, out_minimums);
  const double seconds = best_of(7, [&] { pack_panels(view, &packed, 0, n / kPanel); });
  std::printf("pack %-6s: %.3f ns a weight, %.3f s for 134 million\n", name, seconds * 1e9 / static_cast<double>(n * k),
              seconds / static_cast<double>(n * k) * 134e6);
  std::free(out);
  std::free(out_scales);
  std::free(out_minimums);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Isa> isas = {{"scalar", scalar::quantize_rows, scalar::linear}};
  double limit = 1;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) isas.push_back({"avx2", avx2::quantize_rows, avx2::linear});
  if (__builtin_cpu_supports("avx512vnni")) {
    isas.push_back({"avx512", avx512::quantize_rows, avx512::linear});
    limit = int8_limit();
  }
#endif
  const std::string wanted = argc > 1 ? argv[1] : isas.back().name;
  const std::string wanted_form = argc > 2 ? argv[2] : "";
  const int64_t wanted_n = argc > 3 ? std::atoll(argv[3]) : 0;
  const double bandwidth = read_limit();
  std::printf("limits of one thread: int8 %.0f GOP/s, read %.1f GB/s\n", limit, bandwidth);
  bench_pack("Q4_1", 4, 32, 4, 0, false, false);
  bench_pack("Q8_0", 8, 32, 8, 0, false, false);
  bench_pack("Q5_1", 5, 32, 4, 1, true, false);
  bench_pack("Q4_K", 4, 256, 4, 0, false, true);
  bench_pack("Q6_K", 6, 256, 4, 2, false, true);
  const Form forms[] = {
      {"int4+min", WeightKind::kInt4, 32, 0, false, true}, {"int8", WeightKind::kInt8, 32, 128, false, false},
      {"int4", WeightKind::kInt4, 32, 8, false, false},    {"int4/16", WeightKind::kInt4, 16, 8, true, true},
      {"int8/16", WeightKind::kInt8, 16, 32, true, false}, {"f32", WeightKind::kF32, 0, 0, false, false},
      {"f16", WeightKind::kF16, 0, 0, false, false},       {"bf16", WeightKind::kBF16, 0, 0, false, false}};
  const int64_t shapes[][2] = {{3072, 576}, {576, 1536}, {960, 576}, {49152, 576}, {8192, 2048}, {2048, 8192}};
  for (const Isa& isa : isas) {
    if (wanted != isa.name) continue;
    bench_quantize(isa);
    for (const Form& form : forms) {
      if (!wanted_form.empty() && wanted_form != form.name) continue;
      for (const auto& shape : shapes) {
        if (wanted_n == 0 || wanted_n == shape[0]) bench_shape(isa, form, shape[0], shape[1], limit, bandwidth);
      }
    }
  }
}
