// Packing, rounding to int8, products and embedding rows of every kind of weight, against naive loops written here, on
// every instruction set that this machine has; each must give the bits of the contract (linear.cpp), whatever the
// number of rows. Prints one checksum, the same on every machine. Exit status 0 when all is equal.
//
// Compile linear.cpp and quantize.cpp once an instruction set, with -O3 -ffp-contract=off -std=c++20 and
//   avx512: -DOCTAVO_ISA_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c
//   avx2:   -DOCTAVO_ISA_AVX2 -mavx2 -mfma -mf16c (linear.cpp once more with -DOCTAVO_ISA_AVXVNNI -mavxvnni instead)
//   scalar: nothing (the only one on ARM64),
// then pack.cpp and this file, and link. Meant for -fsanitize=address,undefined too, and for qemu-aarch64.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../kernels.h"

#define OCTAVO_DECLARE(isa)                                                                                        \
  namespace octavo::isa {                                                                                          \
  void quantize_rows(const float* x, int64_t x_stride, int64_t rows, int64_t k, int32_t group, int64_t first_row,     \
                     const QuantizedRows& out);                                                                    \
  void linear(const LinearArgs* args, int64_t panel_begin, int64_t panel_end);                                     \
  void embed_row(const PackedWeight* weight, int64_t row, float* out);                                             \
  }

OCTAVO_DECLARE(scalar)
#if defined(__x86_64__)
OCTAVO_DECLARE(avx2)
OCTAVO_DECLARE(avx512)
namespace octavo::avxvnni {
void linear(const LinearArgs* args, int64_t panel_begin, int64_t panel_end);
}
#endif

namespace {

using namespace octavo;

struct Isa {
  int index;
  const char* name;
  decltype(&scalar::quantize_rows) quantize_rows;
  decltype(&scalar::linear) linear;
  decltype(&scalar::embed_row) embed_row;
};

std::vector<Isa> isas() {
  std::vector<Isa> found = {{0, "scalar", scalar::quantize_rows, scalar::linear, scalar::embed_row}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back({1, "avx2", avx2::quantize_rows, avx2::linear, avx2::embed_row});
  }
  if (__builtin_cpu_supports("avxvnni")) {
    found.push_back({3, "avxvnni", avx2::quantize_rows, avxvnni::linear, avx2::embed_row});
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni")) {
    found.push_back({2, "avx512", avx512::quantize_rows, avx512::linear, avx512::embed_row});
  }
#endif
  return found;
}

int failures = 0;
uint64_t checksums[4] = {1469598103934665603u, 1469598103934665603u, 1469598103934665603u, 1469598103934665603u};  // an instruction set each
std::mt19937 random_bits(20261123);

void fail(const std::string& where, const std::string& what) {
  if (++failures <= 20) std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
}

int integer(int low, int high) { return low + static_cast<int>(random_bits() % static_cast<unsigned>(high - low + 1)); }

float real() { return static_cast<float>(integer(-1000000, 1000000)) * 1e-6f; }

uint32_t bits(float x) {
  uint32_t result;
  std::memcpy(&result, &x, 4);
  return result;
}

bool same(float a, float b) { return bits(a) == bits(b) || (std::isnan(a) && std::isnan(b)); }

// Float16 by ldexp, nothing shared with simd.h.
float from_f16(uint16_t h) {
  const int exponent = (h >> 10) & 31, fraction = h & 1023;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  if (exponent == 31) value = fraction == 0 ? INFINITY : NAN;
  return (h & 0x8000) != 0 ? -value : value;
}

float from_bf16(uint16_t h) {
  const uint32_t wide = static_cast<uint32_t>(h) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}

// 64-byte aligned and exactly as long as asked, so that ASan sees one byte too many.
struct Buffer {
  explicit Buffer(size_t size) : data(static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64))) {
    std::memset(data, 0, size);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* data;
};

// ---- a grouped weight as a file may store it

struct StoredPlane {
  std::vector<uint8_t> data;
  std::vector<uint16_t> byte_of;
  std::vector<uint8_t> shift_of;
  int bits, lift, flip, block_bytes, byte_stride;
};

enum class Order { kHalves, kPairs, kShuffled, kPlain };

// Scales or minimums as a file stores them: halves a group, or halves a block of 256 and six-bit factors a group.
struct StoredScales {
  bool exists = false, two_level = false, is_negated = false;
  std::vector<float> truth;  // [n][k / group]
  std::vector<uint8_t> halves;
  StoredPlane factors;
  int factor_zero = 0;
};

struct Stored {
  int64_t n, k;
  int group, bits, zero;
  std::vector<int> codes;  // [n][k], the truth
  StoredScales scales, minimums;
  std::vector<StoredPlane> planes;
};

// Spreads `bits` bits of each code over blocks of block_len elements, in one of the orders that files have.
StoredPlane store_plane(const std::vector<int>& codes, int64_t n, int64_t k, int block_len, int bits, int lift, Order order, int flip, int byte_stride) {
  const int per_byte = 8 / bits, block_bytes = block_len / per_byte;
  StoredPlane plane{{}, {}, {}, bits, lift, flip, block_bytes, byte_stride};
  std::vector<int> places(static_cast<size_t>(block_len));
  for (int e = 0; e < block_len; ++e) places[static_cast<size_t>(e)] = e;
  if (order == Order::kShuffled) std::shuffle(places.begin(), places.end(), random_bits);
  for (int e = 0; e < block_len; ++e) {
    const int place = places[static_cast<size_t>(e)];
    const bool halves = order == Order::kHalves;  // element e and e + block_bytes share a byte; else neighbours do
    plane.byte_of.push_back(static_cast<uint16_t>(halves ? place % block_bytes : place / per_byte));
    plane.shift_of.push_back(static_cast<uint8_t>(bits * (halves ? place / block_bytes : place % per_byte)));
  }
  const int64_t blocks = k / block_len;
  plane.data.assign(static_cast<size_t>(n * blocks * block_bytes * byte_stride), 0xa5);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      std::vector<uint8_t> bytes(static_cast<size_t>(block_bytes), 0);
      for (int e = 0; e < block_len; ++e) {
        const int part = (codes[static_cast<size_t>(row * k + block * block_len + e)] >> lift) & ((1 << bits) - 1);
        auto& byte = bytes[plane.byte_of[static_cast<size_t>(e)]];
        byte = static_cast<uint8_t>(byte | part << plane.shift_of[static_cast<size_t>(e)]);
      }
      for (int b = 0; b < block_bytes; ++b) {
        plane.data[static_cast<size_t>(((row * blocks + block) * block_bytes + b) * byte_stride)] =
            static_cast<uint8_t>(bytes[static_cast<size_t>(b)] ^ flip);
      }
    }
  }
  return plane;
}

uint16_t random_half() { return static_cast<uint16_t>(integer(0, 1) << 15 | integer(0, 12) << 10 | integer(0, 1023)); }

StoredScales store_scales(const Stored& w, bool two_level, bool is_negated) {
  StoredScales result;
  result.exists = true;
  result.two_level = two_level;
  result.is_negated = is_negated;
  const int64_t groups = w.k / w.group, steps = two_level ? w.k / 256 : groups;
  std::vector<float> d;
  for (int64_t i = 0; i < w.n * steps; ++i) {
    const uint16_t half = random_half();
    d.push_back(from_f16(half));
    const auto* raw = reinterpret_cast<const uint8_t*>(&half);
    result.halves.insert(result.halves.end(), raw, raw + 2);
  }
  if (!two_level) {
    result.truth = d;
    return result;
  }
  result.factor_zero = is_negated ? 0 : 32;
  std::vector<int> factors;
  for (int64_t i = 0; i < w.n * groups; ++i) {
    factors.push_back(integer(0, 63));
    const int factor = factors.back() - result.factor_zero;
    result.truth.push_back(d[static_cast<size_t>(i / (256 / w.group))] * static_cast<float>(is_negated ? -factor : factor));
  }
  result.factors = store_plane(factors, w.n, groups, 256 / w.group, 8, 0, Order::kPlain, 0, 1);
  return result;
}

Stored make_weight(int64_t n, int64_t k, int group, int bits, int zero, bool minimums, bool two_level) {
  Stored w{n, k, group, bits, zero, {}, {}, {}, {}};
  const int top = (1 << bits) - 1;
  for (int64_t i = 0; i < n * k; ++i) w.codes.push_back(integer(0, 3) == 0 ? top : integer(0, top));
  // The greatest sums that there can be, with two rows of make_rows.
  for (int64_t j = 0; j < k; ++j) w.codes[static_cast<size_t>(j)] = 0, w.codes[static_cast<size_t>((n - 1) * k + j)] = top;
  w.scales = store_scales(w, two_level, false);
  if (minimums) w.minimums = store_scales(w, two_level, true);
  return w;
}

StoredPlane store_plane(const Stored& w, int block_len, int bits, int lift, Order order, int flip, int byte_stride) {
  return store_plane(w.codes, w.n, w.k, block_len, bits, lift, order, flip, byte_stride);
}

PlaneView view_of(const StoredPlane& p, int64_t columns) {
  const auto block_len = static_cast<int32_t>(p.byte_of.size());
  const int64_t block_stride = static_cast<int64_t>(p.block_bytes) * p.byte_stride;
  return {p.data.data(),  columns / block_len * block_stride, block_stride, p.byte_stride, p.byte_of.data(), p.shift_of.data(),
          block_len,      p.bits,                             p.lift,       p.flip};
}

ScaleView view_of(const Stored& w, const StoredScales& scales) {
  if (!scales.exists) return {};
  const int64_t steps = scales.two_level ? w.k / 256 : w.k / w.group;
  ScaleView view{scales.halves.data(), steps * 2, 2, {0, scales.factor_zero, {}}, scales.is_negated};
  if (scales.two_level) {
    view.factors.num_planes = 1;
    view.factors.planes[0] = view_of(scales.factors, w.k / w.group);
  }
  return view;
}

GroupedView view_of(const Stored& w) {
  GroupedView view{w.n, w.k, w.group, w.bits, {static_cast<int32_t>(w.planes.size()), w.zero, {}}, {}, {}};
  for (size_t i = 0; i < w.planes.size(); ++i) view.codes.planes[i] = view_of(w.planes[i], w.k);
  view.scales = view_of(w, w.scales);
  view.minimums = view_of(w, w.minimums);
  return view;
}

// ---- the contract, naively

struct Rounded {
  std::vector<int> codes, sums;
  std::vector<float> scales;
};

Rounded round_rows(const std::vector<float>& x, int64_t rows, int64_t k, int64_t stride, int group) {
  Rounded result;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t g = 0; g < k / group; ++g) {
      const float* p = x.data() + row * stride + g * group;
      float greatest = 0.0f;
      for (int i = 0; i < group; ++i) greatest = std::max(greatest, std::fabs(p[i]));
      int sum = 0;
      for (int i = 0; i < group; ++i) {
        const int code = greatest == 0.0f ? 0 : static_cast<int>(std::nearbyint(p[i] * (127.0f / greatest)));
        result.codes.push_back(code);
        sum += code;
      }
      result.sums.push_back(sum);
      result.scales.push_back(greatest / 127.0f);
    }
  }
  return result;
}

float product(const Stored& w, const Rounded& x, int64_t row, int64_t column) {
  const int64_t groups = w.k / w.group;
  float c = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    int dot = 0;
    for (int64_t j = g * w.group; j < (g + 1) * w.group; ++j) {
      dot += (w.codes[static_cast<size_t>(column * w.k + j)] - w.zero) * x.codes[static_cast<size_t>(row * w.k + j)];
    }
    const auto at = static_cast<size_t>(row * groups + g), weight_at = static_cast<size_t>(column * groups + g);
    c = std::fma(static_cast<float>(dot), w.scales.truth[weight_at] * x.scales[at], c);
    if (w.minimums.exists) c = std::fma(w.minimums.truth[weight_at], x.scales[at] * static_cast<float>(x.sums[at]), c);
  }
  return c;
}

// Memory for rows rounded to int8.
struct QuantizedBuffers {
  QuantizedBuffers(int64_t rows, int64_t k, int64_t group)
      : stride(quantized_stride(rows)),
        codes(static_cast<size_t>(stride * k)),
        scales(static_cast<size_t>(stride * (k / group))),
        scaled_sums(scales.size()),
        sums(2 * scales.size()) {}
  QuantizedRows rows() { return {codes.data(), scales.data(), sums.data(), scaled_sums.data(), stride}; }

  int64_t stride;
  std::vector<int8_t> codes;
  std::vector<float> scales, scaled_sums;
  std::vector<int16_t> sums;
};

// ---- one weight on one instruction set

struct Case {
  const Isa* isa;
  const PackedWeight* packed;
  std::string name;
  std::vector<float> bias;  // empty: none
  bool residual;
  std::function<float(int64_t row, int64_t column)> expected;  // without bias and residual
};

// Runs rows of x through linear and compares every bit, also those around the output.
void check_linear(const Case& test, const std::vector<float>& x, int64_t first_row, int64_t rows) {
  const PackedWeight& w = *test.packed;
  uint64_t& sum = checksums[test.isa->index];
  const int64_t stride = w.n + 5, groups = w.group == 0 ? 0 : w.k / w.group;
  QuantizedBuffers x_rounded(rows, w.k, groups == 0 ? w.k : w.group);
  std::vector<float> out(static_cast<size_t>((rows - 1) * stride + w.n), 77.0f);
  std::vector<float> dense(x.begin() + first_row * w.k, x.begin() + (first_row + rows) * w.k);
  if (test.residual) {
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(i % 1009) * 0.37f - 180.0f;
  }
  const std::vector<float> before = out;
  LinearArgs args{&w,
                  rows,
                  dense.data(),
                  x_rounded.rows(),
                  out.data(),
                  stride,
                  test.bias.empty() ? nullptr : test.bias.data(),
                  test.residual ? out.data() : nullptr};
  if (groups > 0) test.isa->quantize_rows(dense.data(), w.k, rows, w.k, w.group, 0, args.quantized);
  const int64_t panels = (w.n + kPanel - 1) / kPanel, cut = panels / 2;
  test.isa->linear(&args, cut, panels);
  test.isa->linear(&args, 0, cut);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < std::min(stride, static_cast<int64_t>(out.size()) - row * stride); ++column) {
      const auto at = static_cast<size_t>(row * stride + column);
      float expected = before[at];
      if (column < w.n) {
        expected = test.expected(first_row + row, column);
        if (!test.bias.empty()) expected = expected + test.bias[static_cast<size_t>(column)];
        if (test.residual) expected = expected + before[at];
        sum = (sum ^ bits(out[at])) * 1099511628211u;
      }
      if (!same(out[at], expected)) {
        return fail(test.name, std::string(test.isa->name) + " rows " + std::to_string(rows) + " row " +
                                   std::to_string(row) + " column " + std::to_string(column) + ": " +
                                   std::to_string(out[at]) + " for " + std::to_string(expected));
      }
    }
  }
}

void check_rows(Case test, const std::vector<float>& x, const std::vector<int>& counts) {
  std::vector<float> bias;
  for (int64_t i = 0; i < test.packed->n; ++i) bias.push_back(static_cast<float>(i % 101) * 0.13f - 6.0f);
  int variant = 0;
  for (const int rows : counts) {
    test.bias = variant % 2 == 1 ? bias : std::vector<float>();
    test.residual = variant % 3 == 1;
    ++variant;
    check_linear(test, x, rows % 5, rows);  // rows stand beside other rows than before
  }
}

void check_quantize(const Isa& isa, const std::string& name, const std::vector<float>& x, const Rounded& expected,
                    int64_t rows, int64_t k, int64_t stride, int group) {
  QuantizedBuffers buffers(rows, k, group);
  const QuantizedRows out = buffers.rows();
  isa.quantize_rows(x.data(), stride, rows, k, group, 0, out);
  const int64_t groups = k / group;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = g * out.stride + row;
      const auto wanted = static_cast<size_t>(row * groups + g);
      const auto sum = static_cast<float>(expected.sums[wanted]);
      for (int64_t i = 0; i < group; ++i) {
        if (out.codes[at * group + i] != expected.codes[static_cast<size_t>(row * k + g * group + i)]) {
          return fail(name, std::string(isa.name) + " code of row " + std::to_string(row));
        }
      }
      if (bits(out.scales[at]) != bits(expected.scales[wanted]) || static_cast<float>(out.sums[2 * at] + out.sums[2 * at + 1]) != sum ||
          bits(out.scaled_sums[at]) != bits(expected.scales[wanted] * sum)) {
        return fail(name, std::string(isa.name) + " scale or sum of row " + std::to_string(row));
      }
    }
  }
}

std::vector<float> make_rows(int64_t rows, int64_t k) {
  std::vector<float> x;
  for (int64_t i = 0; i < rows * k; ++i) x.push_back(real() * std::ldexp(1.0f, integer(-6, 6)));
  for (int64_t i = 0; i < 16 && i < k; ++i) x[static_cast<size_t>(i)] = i % 2 == 0 ? 0.0f : -0.0f;  // a group of zeros
  for (int64_t i = 16; i < 32 && k >= 32; ++i) x[static_cast<size_t>(i)] = i % 2 == 0 ? 0.0f : -0.0f;
  for (int64_t i = 3 * k; i < 5 * k; ++i) x[static_cast<size_t>(i)] = i < 4 * k ? 1.0f : -1.0f;  // see make_weight
  return x;
}

void check_grouped(Stored w, const std::string& name, const std::vector<int>& counts) {
  const GroupedView view = view_of(w);
  Buffer data(packed_bytes(describe(view, nullptr)));
  PackedWeight packed = describe(view, data.data);
  const int64_t panels = (w.n + kPanel - 1) / kPanel;
  for (int64_t panel = panels; panel > 0; --panel) pack_panels(view, &packed, panel - 1, panel);
  int most = 0;
  for (const int rows : counts) most = std::max(most, rows);
  const std::vector<float> x = make_rows(most + 4, w.k);
  const Rounded rounded = round_rows(x, most + 4, w.k, w.k, w.group);
  std::vector<float> products;
  for (int64_t row = 0; row < most + 4; ++row) {
    for (int64_t column = 0; column < w.n; ++column) products.push_back(product(w, rounded, row, column));
  }
  for (const Isa& isa : isas()) {
    check_quantize(isa, name, x, rounded, most + 4, w.k, w.k, w.group);
    const auto expected = [&](int64_t row, int64_t column) { return products[static_cast<size_t>(row * w.n + column)]; };
    check_rows({&isa, &packed, name, {}, false, expected}, x, counts);
    std::vector<float> out(static_cast<size_t>(w.k));
    for (int64_t row = 0; row < w.n; ++row) {
      isa.embed_row(&packed, row, out.data());
      for (int64_t j = 0; j < w.k; ++j) {
        const auto at = static_cast<size_t>(row * (w.k / w.group) + j / w.group);
        const float scaled = w.scales.truth[at] * static_cast<float>(w.codes[static_cast<size_t>(row * w.k + j)] - w.zero);
        const float expected = w.minimums.exists ? scaled + w.minimums.truth[at] : scaled;
        if (bits(out[static_cast<size_t>(j)]) != bits(expected)) {
          fail(name, std::string(isa.name) + " embed_row " + std::to_string(row));
          break;
        }
      }
    }
  }
}

// ---- the cases

const std::vector<int> kFewCounts = {1, 2, 3, 4, 5, 7, 13};
const std::vector<int> kAllCounts = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 64, 96};

void test_every_width() {
  for (int bits = 2; bits <= 8; ++bits) {
    for (const int group : {16, 32}) {
      for (int variant = 0; variant < 4; ++variant) {
        const bool minimums = variant % 2 == 1, two_level = variant >= 2;
        const int zero = minimums ? variant / 2 : 1 << (bits - 1);
        // One level: an odd number of groups, so that one of 16 ends k with half a unit.
        const int64_t k = two_level ? 256 * (variant - 1) : (2 * variant + 5) * group;
        Stored w = make_weight(32 + 13 * variant, k, group, bits, zero, minimums, two_level);
        const auto order = static_cast<Order>(variant);
        const int low = bits >= 8 ? 8 : bits >= 4 ? 4 : 2, byte_stride = variant == 3 ? 2 : 1;
        const int flip = bits == 8 ? 0x80 : variant == 2 ? 0x0f : 0;
        w.planes.push_back(store_plane(w, two_level ? 64 : group, low, 0, order, flip, byte_stride));
        if (bits - low >= 2) w.planes.push_back(store_plane(w, two_level ? 128 : group, 2, low, Order::kHalves, 0, 1));
        if ((bits - low) % 2 == 1) {
          w.planes.push_back(store_plane(w, two_level ? 32 : group, 1, bits - 1,
                                         variant % 2 == 0 ? Order::kPairs : Order::kHalves, bits == 5 ? 0xff : 0, 1));
        }
        const std::string name = "bits " + std::to_string(bits) + " group " + std::to_string(group);
        check_grouped(w, name + " variant " + std::to_string(variant), kFewCounts);
      }
    }
  }
}

void test_every_count() {
  for (const int bits : {4, 5, 8}) {
    Stored w = make_weight(71, 96, 32, bits, bits == 4 ? 0 : 1 << (bits - 1), bits == 4, false);
    w.planes.push_back(store_plane(w, 32, bits == 8 ? 8 : 4, 0, Order::kHalves, bits == 8 ? 0x80 : 0, 1));
    if (bits == 5) w.planes.push_back(store_plane(w, 32, 1, 4, Order::kPairs, 0, 1));
    check_grouped(w, "counts " + std::to_string(bits), kAllCounts);
  }
}

void test_tiny() {
  Stored w = make_weight(1, 16, 16, 4, 8, false, false);
  w.planes.push_back(store_plane(w, 16, 4, 0, Order::kShuffled, 0, 1));
  check_grouped(w, "tiny", {1, 2, 6, 7});
}

// Enough numbers that some lie beside a tie, where the rounding of 127 / max|x| itself decides.
void test_rounding() {
  for (const int group : {16, 32}) {
    const int64_t rows = 500, k = 21 * 32, stride = k + 1;
    std::vector<float> x;
    for (int64_t i = 0; i < rows * stride; ++i) x.push_back(real());
    const Rounded rounded = round_rows(x, rows, k, stride, group);
    for (const Isa& isa : isas()) check_quantize(isa, "rounding", x, rounded, rows, k, stride, group);
  }
}

void test_dense() {
  for (const WeightKind kind : {WeightKind::kF32, WeightKind::kF16, WeightKind::kBF16}) {
    const int64_t n = 77, k = 59, size = kind == WeightKind::kF32 ? 4 : 2, row_stride = k * size + 6;
    std::vector<uint8_t> data(static_cast<size_t>((n - 1) * row_stride + k * size));
    std::vector<float> truth;
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t j = 0; j < k; ++j) {
        float value = real();
        const uint32_t wide = bits(value);
        auto half = static_cast<uint16_t>(wide >> 16);
        if (kind == WeightKind::kF16) half = static_cast<uint16_t>(integer(0, 1) << 15 | integer(0, 14) << 10 | integer(0, 1023));
        if (kind == WeightKind::kF16) value = from_f16(half);
        if (kind == WeightKind::kBF16) value = from_bf16(half);
        truth.push_back(value);
        uint8_t* to = data.data() + row * row_stride + j * size;
        std::memcpy(to, size == 4 ? static_cast<const void*>(&value) : &half, static_cast<size_t>(size));
      }
    }
    const DenseView view{n, k, kind, data.data(), row_stride};
    Buffer data_of(packed_bytes(describe(view, nullptr)));
    PackedWeight packed = describe(view, data_of.data);
    pack_panels(view, &packed, 0, 1);
    pack_panels(view, &packed, 1, (n + kPanel - 1) / kPanel);
    const std::string name = "dense " + std::to_string(static_cast<int>(kind));
    const std::vector<float> x = make_rows(100, k);
    std::vector<float> products;
    for (int64_t row = 0; row < 100; ++row) {
      for (int64_t column = 0; column < n; ++column) {
        float c = 0.0f;
        const auto at = static_cast<size_t>(column * k), x_at = static_cast<size_t>(row * k);
        for (size_t j = 0; j < static_cast<size_t>(k); ++j) c = std::fma(truth[at + j], x[x_at + j], c);
        products.push_back(c);
      }
    }
    for (const Isa& isa : isas()) {
      const auto expected = [&](int64_t row, int64_t column) { return products[static_cast<size_t>(row * n + column)]; };
      check_rows({&isa, &packed, name, {}, false, expected}, x, kAllCounts);
      std::vector<float> out(static_cast<size_t>(k));
      for (int64_t row = 0; row < n; ++row) {
        isa.embed_row(&packed, row, out.data());
        if (std::memcmp(out.data(), truth.data() + row * k, static_cast<size_t>(k) * 4) != 0) fail(name, "embed_row");
      }
    }
  }
}

// A row with NaN or infinity comes out NaN and leaves its neighbours alone; tiny groups count as zeros; rows may be
// strided.
void test_strange_numbers() {
  const int64_t n = 40, k = 64;
  Stored w = make_weight(n, k, 32, 4, 8, false, false);
  for (size_t i = 0; i < w.scales.truth.size(); ++i) {
    const uint16_t half = 0x3800;  // 0.5
    w.scales.truth[i] = 0.5f;
    std::memcpy(w.scales.halves.data() + 2 * i, &half, 2);
  }
  w.planes.push_back(store_plane(w, 32, 4, 0, Order::kHalves, 0, 1));
  const GroupedView view = view_of(w);
  Buffer data(packed_bytes(describe(view, nullptr)));
  PackedWeight packed = describe(view, data.data);
  pack_panels(view, &packed, 0, 2);
  const int64_t stride = k + 3;
  std::vector<float> x(static_cast<size_t>(5 * stride), NAN);
  for (int64_t row = 0; row < 5; ++row) {
    for (int64_t j = 0; j < k; ++j) x[static_cast<size_t>(row * stride + j)] = real();
  }
  x[static_cast<size_t>(1 * stride + 7)] = NAN;
  x[static_cast<size_t>(2 * stride + 40)] = -INFINITY;
  for (int64_t j = 0; j < 32; ++j) x[static_cast<size_t>(3 * stride + j)] = 1e-39f;
  std::vector<float> clean = x;
  for (int64_t j = 0; j < 32; ++j) clean[static_cast<size_t>(3 * stride + j)] = 0.0f;
  for (float& value : clean) value = std::isfinite(value) ? value : 0.0f;
  const Rounded rounded = round_rows(clean, 5, k, stride, 32);
  for (const Isa& isa : isas()) {
    QuantizedBuffers buffers(5, k, 32);
    std::vector<float> out(static_cast<size_t>(5 * n));
    LinearArgs args{&packed, 5, nullptr, buffers.rows(), out.data(), n, nullptr, nullptr};
    isa.quantize_rows(x.data(), stride, 5, k, 32, 0, args.quantized);
    isa.linear(&args, 0, 2);
    if (buffers.scales[3] != 0.0f) fail("strange numbers", std::string(isa.name) + " scale of a tiny group");
    for (int64_t row = 0; row < 5; ++row) {
      for (int64_t column = 0; column < n; ++column) {
        const float expected = row == 1 || row == 2 ? NAN : product(w, rounded, row, column);
        if (!same(out[static_cast<size_t>(row * n + column)], expected)) {
          return fail("strange numbers", std::string(isa.name) + " row " + std::to_string(row));
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_every_width();
  test_every_count();
  test_tiny();
  test_dense();
  test_rounding();
  test_strange_numbers();
  std::string names;
  for (const Isa& isa : isas()) {
    names += std::string(" ") + isa.name;
    if (checksums[isa.index] != checksums[0]) fail(isa.name, "the checksum differs from scalar's");
  }
  std::printf("%s:%s, %d failures, checksum %016llx\n", failures == 0 ? "passed" : "failed", names.c_str(), failures,
              static_cast<unsigned long long>(checksums[0]));
  return failures == 0 ? 0 : 1;
}
