// Norm, rope, KV write, attention, activation and sampling against naive double loops, and the thread pool, on every
// instruction set that this machine has. Buffers are exactly as large as the contract says, so that a sanitizer sees every
// access outside. Exit status 0 when all is well.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../kernels.h"
#include "../program.h"
#include "../thread_pool.h"

namespace {

using namespace octavo;

int failures = 0;

void expect(bool condition, const char* what, const char* isa) {
  if (condition) return;
  ++failures;
  std::printf("FAILED %s (%s)\n", what, isa);
}

void expect_close(const std::vector<float>& actual, const std::vector<double>& wanted, double bound, const char* what,
                  const char* isa) {
  double worst = 0.0, largest = 1e-30;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = std::fabs(static_cast<double>(actual[i]) - wanted[i]);
    worst = error > worst || std::isnan(error) ? error : worst;
    largest = std::fmax(largest, std::fabs(wanted[i]));
  }
  expect(worst <= bound * largest, what, isa);
}

std::mt19937_64 generator(5);

std::vector<float> random_floats(size_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

double half_to_double(uint16_t h) {
  const int exponent = (h >> 10) & 31, fraction = h & 1023;
  const double magnitude = exponent == 0    ? std::ldexp(fraction, -24)
                           : exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                                            : std::ldexp(1024 + fraction, exponent - 25);
  return (h & 0x8000) != 0 ? -magnitude : magnitude;
}

void test_elementwise(const KernelTable& table) {
  for (int64_t features : {1, 15, 16, 17, 63, 64, 65, 300}) {
    const auto x = random_floats(static_cast<size_t>(3 * features)), weight = random_floats(static_cast<size_t>(features));
    std::vector<float> out(x.size()), product(x.size()), gelu(x.size()), sum(x.size());
    std::vector<double> wanted(x.size()), wanted_product(x.size()), wanted_gelu(x.size()), wanted_sum(x.size());
    table.rms_norm(x.data(), weight.data(), 1e-5f, 3, features, out.data());
    const auto y = random_floats(x.size());
    table.silu_mul(x.data(), y.data(), 3 * features, product.data());
    table.gelu_mul(x.data(), y.data(), 3 * features, gelu.data());
    table.add(x.data(), y.data(), 3 * features, sum.data());
    for (int64_t row = 0; row < 3; ++row) {
      double squares = 0.0;
      for (int64_t i = 0; i < features; ++i) squares += std::pow(static_cast<double>(x[row * features + i]), 2);
      for (int64_t i = 0; i < features; ++i) {
        const auto at = static_cast<size_t>(row * features + i);
        const double value = x[at];
        wanted[at] = value / std::sqrt(squares / static_cast<double>(features) + 1e-5) * weight[static_cast<size_t>(i)];
        wanted_product[at] = value / (1.0 + std::exp(-value)) * y[at];
        const double inner = std::sqrt(2.0 / std::acos(-1.0)) * (value + 0.044715 * value * value * value);
        wanted_gelu[at] = value / 2.0 * (1.0 + std::tanh(inner)) * y[at];
        wanted_sum[at] = value + y[at];
      }
    }
    expect_close(out, wanted, 2e-6, "rms_norm", table.isa);
    expect_close(product, wanted_product, 2e-6, "silu_mul", table.isa);
    expect_close(gelu, wanted_gelu, 2e-6, "gelu_mul", table.isa);
    expect_close(sum, wanted_sum, 1e-7, "add", table.isa);
  }
}

void test_rope(const KernelTable& table) {
  for (int32_t head_dim : {2, 16, 48, 64, 80}) {
    const int64_t half = head_dim / 2, stride = 3 * head_dim;
    const auto x = random_floats(static_cast<size_t>(2 * stride));
    const auto angles = random_floats(static_cast<size_t>(2 * head_dim));
    const float* rows[2] = {angles.data(), angles.data() + head_dim};
    auto out = x;
    std::vector<double> wanted(x.size());
    table.rope(out.data(), stride, 2, 3, head_dim, rows);
    for (int64_t i = 0; i < 2 * stride; ++i) {
      const int64_t d = i % head_dim, pair = d < half ? i + half : i - half;
      const float* angle = rows[i / stride];
      const double c = angle[d % half], s = angle[half + d % half];
      wanted[static_cast<size_t>(i)] = x[static_cast<size_t>(i)] * c + (d < half ? -1 : 1) * x[static_cast<size_t>(pair)] * s;
    }
    expect_close(out, wanted, 1e-6, "rope", table.isa);
  }
}

struct AttentionCase {
  int32_t num_heads, num_kv_heads, head_dim, block_size;
  int64_t seen, rows;  // tokens before the rows, query tokens
  int64_t window = 1 << 20;
  float soft_cap = 0.0f;
  KvKind kind = KvKind::kF16;
};

void test_attention(const KernelTable& table, const AttentionCase& c) {
  const int64_t total = c.seen + c.rows, blocks = (total + c.block_size - 1) / c.block_size;
  const int64_t kv_features = c.num_kv_heads * c.head_dim, features = c.num_heads * c.head_dim;
  const auto k = random_floats(static_cast<size_t>(total * kv_features));
  const auto v = random_floats(static_cast<size_t>(total * kv_features));
  const auto q = random_floats(static_cast<size_t>(c.rows * features), 2.0f);
  const auto elements = static_cast<size_t>((blocks + 1) * kv_features * c.block_size);
  // NaN wherever nobody wrote: as float16, and as the float32 scales of int8.
  std::vector<uint16_t> k_cache(elements, 0x7fff), v_cache(elements, 0x7fff);
  std::vector<int32_t> block_table, slots, positions;
  for (int64_t i = 0; i < blocks; ++i) block_table.push_back(static_cast<int32_t>(blocks - i));  // block 0 stays NaN
  for (int64_t i = 0; i < total; ++i) {
    slots.push_back(static_cast<int32_t>(block_table[static_cast<size_t>(i / c.block_size)] * c.block_size + i % c.block_size));
  }
  for (int64_t i = 0; i < c.rows; ++i) positions.push_back(static_cast<int32_t>(c.seen + i));

  std::vector<float> factors, inverses;  // powers of two: what they do is exact
  for (int64_t i = 0; i < kv_features; ++i) {
    factors.push_back(std::ldexp(1.0f, static_cast<int>(-(i % 3))));
    inverses.push_back(1.0f / factors.back());
  }
  AttentionArgs args{};
  std::vector<float> out(q.size());
  args.query = q.data();
  args.out = out.data();
  args.k_cache = reinterpret_cast<uint8_t*>(k_cache.data());
  args.v_cache = reinterpret_cast<uint8_t*>(v_cache.data());
  args.kind = c.kind;
  args.head_bytes = c.block_size * (c.kind == KvKind::kInt8 ? c.head_dim + 4 : 2 * c.head_dim);
  args.factors = factors.data();
  args.inverses = inverses.data();
  args.num_heads = c.num_heads;
  args.num_kv_heads = c.num_kv_heads;
  args.head_dim = c.head_dim;
  args.block_size = c.block_size;
  args.scale = 0.125f;
  args.window = c.window;
  args.soft_cap = c.soft_cap;
  args.positions = positions.data();
  table.write_kv(k.data(), v.data(), kv_features, total, &args, slots.data());
  const int64_t group = c.num_heads / c.num_kv_heads;
  std::vector<float> scratch(attention_scratch_floats(c.rows, group, c.head_dim));
  for (int32_t head = 0; head < c.num_kv_heads; ++head) {
    table.attention(&args, block_table.data(), 0, c.rows, head, scratch.data());
  }

  const auto whole = out;
  const auto stride = static_cast<int64_t>(attention_partial_floats(c.rows, group, c.head_dim));
  const int64_t segments = (total + kAttentionSegment - 1) / kAttentionSegment;
  for (int32_t head = 0; head < c.num_kv_heads; ++head) {
    std::vector<float> partials(static_cast<size_t>(segments * stride));
    for (int64_t segment = segments; segment-- > 0;) {  // in any order
      table.attention_segment(&args, block_table.data(), 0, c.rows, head, segment, partials.data() + segment * stride,
                              scratch.data());
    }
    table.attention_merge(&args, 0, c.rows, head, partials.data(), stride);
  }
  expect(std::memcmp(whole.data(), out.data(), out.size() * sizeof(float)) == 0, "attention in segments", table.isa);

  std::vector<double> wanted(q.size());
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t head = 0; head < c.num_heads; ++head) {
      const int64_t visible = c.seen + row + 1, kv_head = head / group;
      const int64_t first = std::max<int64_t>(0, visible - c.window);
      std::vector<double> weights;
      const auto cached = [&](const std::vector<uint16_t>& cache, int64_t token, int64_t d, bool tokens_in_lanes) {
        const int64_t slot = slots[static_cast<size_t>(token)], offset = slot % c.block_size;
        const auto* part = reinterpret_cast<const uint8_t*>(cache.data()) +
                           (slot / c.block_size * c.num_kv_heads + kv_head) * args.head_bytes;
        const int64_t at = tokens_in_lanes ? d * c.block_size + offset : offset * c.head_dim + d;
        if (c.kind == KvKind::kF16) return half_to_double(reinterpret_cast<const uint16_t*>(part)[at]);
        const double scale = reinterpret_cast<const float*>(part + c.head_dim * c.block_size)[offset];
        const double factor = tokens_in_lanes ? factors[static_cast<size_t>(kv_head * c.head_dim + d)] : 1.0f;
        return factor * scale * reinterpret_cast<const int8_t*>(part)[at];
      };
      double top = -INFINITY, sum = 0.0;
      for (int64_t token = first; token < visible; ++token) {
        double score = 0.0;
        for (int64_t d = 0; d < c.head_dim; ++d) {
          score += q[static_cast<size_t>(row * features + head * c.head_dim + d)] * cached(k_cache, token, d, true);
        }
        score *= 0.125;
        weights.push_back(c.soft_cap > 0.0f ? c.soft_cap * std::tanh(score / c.soft_cap) : score);
        top = std::fmax(top, weights.back());
      }
      for (double& weight : weights) sum += weight = std::exp(weight - top);
      for (int64_t d = 0; d < c.head_dim; ++d) {
        double value = 0.0;
        for (int64_t token = first; token < visible; ++token) {
          value += weights[static_cast<size_t>(token - first)] / sum * cached(v_cache, token, d, false);
        }
        wanted[static_cast<size_t>(row * features + head * c.head_dim + d)] = value;
      }
    }
  }
  expect_close(out, wanted, 4e-6, "attention", table.isa);
}

void test_sample(const KernelTable& table) {
  for (int64_t vocab : {1, 17, 64, 65, 1000}) {
    for (int32_t mode = 0; mode < 6; ++mode) {
      const auto logits = random_floats(static_cast<size_t>(vocab), 3.0f);
      std::vector<float> work(static_cast<size_t>(4 * vocab)), top_logprobs(1);
      std::vector<int32_t> top_ids(1);
      const int32_t seen[1] = {0}, counts[1] = {2};
      const float bias[1] = {1.0f};
      int32_t token = -7;
      float logprob = 1.0f;
      SampleArgs args{};
      args.logits = logits.data();
      args.work = work.data();
      args.vocab = vocab;
      args.temperature = mode == 0 ? 0.0f : 1.0f;
      args.top_p = mode == 2 || mode == 5 ? 0.9f : 1.0f;
      args.min_p = mode == 3 ? 0.1f : 0.0f;
      args.top_k = mode == 4 ? 5 : mode == 5 ? 300 : 0;
      args.repetition = 1.5f;
      args.num_logprobs = 1;
      args.seed = 42;
      args.seen_ids = seen;
      args.seen_counts = counts;
      args.num_seen = 1;
      args.bias_ids = seen;
      args.bias_values = bias;
      args.num_bias = 1;
      args.token = &token;
      args.logprob = &logprob;
      args.top_ids = top_ids.data();
      args.top_logprobs = top_logprobs.data();
      table.sample(&args);
      expect(token >= 0 && token < vocab, "sample: token", table.isa);
      double top = -INFINITY, sum = 0.0;
      size_t best = 0;
      for (size_t i = 0; i < logits.size(); ++i) {
        if (logits[i] > logits[best]) best = i;
      }
      top = logits[best];
      for (float logit : logits) sum += std::exp(static_cast<double>(logit) - top);
      const double wanted = static_cast<double>(logits[static_cast<size_t>(token)]) - top - std::log(sum);
      expect(std::fabs(static_cast<double>(logprob) - wanted) < 1e-5, "sample: logprob", table.isa);
      expect(top_ids[0] == static_cast<int32_t>(best), "sample: best", table.isa);
    }
  }
}

// Adds every item's number to its stage's sum, and sees stages in order.
class CountingJob final : public Job {
 public:
  explicit CountingJob(std::vector<int64_t> items) : items_(std::move(items)), sums_(items_.size()) {}
  int64_t num_stages() const override { return static_cast<int64_t>(items_.size()); }
  int64_t num_items(int64_t stage) const override { return items_[static_cast<size_t>(stage)]; }
  void work(int64_t stage, int64_t item, int) override {
    for (int64_t before = 0; before < stage; ++before) {
      const int64_t n = items_[static_cast<size_t>(before)];
      if (sums_[static_cast<size_t>(before)].load() != n * (n + 1) / 2) in_order_ = false;
    }
    sums_[static_cast<size_t>(stage)].fetch_add(item + 1);
  }
  bool is_complete() const {
    for (size_t i = 0; i < items_.size(); ++i) {
      if (sums_[i].load() != items_[i] * (items_[i] + 1) / 2) return false;
    }
    return in_order_;
  }

 private:
  std::vector<int64_t> items_;
  std::vector<std::atomic<int64_t>> sums_;
  std::atomic<bool> in_order_{true};
};

void test_thread_pool() {
  for (int num_threads : {1, 2, 5}) {
    ThreadPool pool(num_threads);
    for (int round = 0; round < 200; ++round) {
      CountingJob job({3, 0, 1, 40, 1, 1, 7, 0});
      pool.run(job);
      expect(job.is_complete(), "thread pool", "");
    }
  }
}

}  // namespace

int main() {
  for (const char* isa : {"scalar", "avx2", "avx512"}) {
    const KernelTable* table = kernel_table(isa);
    if (table == nullptr) continue;
    test_elementwise(*table);
    test_rope(*table);
    for (AttentionCase c : {AttentionCase{1, 1, 16, 8, 0, 1}, {6, 2, 64, 8, 61, 7}, {9, 3, 64, 16, 127, 3},
                                   {4, 4, 96, 32, 5, 70}, {7, 1, 128, 64, 64, 1}, {2, 1, 256, 16, 200, 2},
                                   {4, 2, 32, 16, 1021, 5}, {6, 2, 64, 8, 61, 70, 33}, {4, 1, 32, 16, 1533, 9, 513},
                                   {2, 1, 16, 32, 100, 3, 1}, {4, 2, 32, 16, 40, 5, 1 << 20, 2.0f}}) {
      test_attention(*table, c);
      c.kind = KvKind::kInt8;
      test_attention(*table, c);
    }
    test_sample(*table);
  }
  test_thread_pool();
  std::printf(failures == 0 ? "kernel_test: all is well\n" : "kernel_test: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
