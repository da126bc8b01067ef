// Whole blocks of the KV cache copied, read and written by one thread and by several, beside a plain copy of the pool.
// Buffers are exactly as large as they must be. Exit status 0 when all is well.
#include <algorithm>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <vector>

#include "../program.h"

namespace {

using namespace octavo;

int failures = 0;

void expect(bool condition, const char* what, int threads) {
  if (condition) return;
  ++failures;
  std::printf("FAILED %s (%d threads)\n", what, threads);
}

constexpr int64_t kLayers = 5, kBlocks = 70;

void test(int threads, int64_t block_size, KvKind kind) {
  Program program("scalar", threads, Limits{block_size, 8, 4, 128, kind});
  program.add_cache_geometry(CacheGeometry{0, 4, 2, 16, 1.0f, 128, 0.0f, -1, -1});
  program.finish(64, -1, 0);
  program.allocate_cache(kLayers, kBlocks);
  const int64_t bytes = program.block_bytes();
  const int64_t head = block_size * (kind == KvKind::kInt8 ? 16 + 4 : 2 * 16);
  expect(bytes == 2 * kLayers * 2 * head, "bytes of a block", threads);

  std::mt19937 generator(7);
  std::vector<int32_t> every(kBlocks);
  for (int32_t i = 0; i < kBlocks; ++i) every[static_cast<size_t>(i)] = i;
  std::vector<uint8_t> pool(static_cast<size_t>(kBlocks * bytes)), found(pool.size(), 1);
  const auto read_all = [&] { program.read_blocks(every.data(), kBlocks, found.data()); };
  read_all();
  expect(found == pool, "a new pool is zero", threads);
  for (uint8_t& byte : pool) byte = static_cast<uint8_t>(generator());
  program.write_blocks(every.data(), kBlocks, pool.data());
  read_all();
  expect(found == pool, "what was written is read", threads);

  for (int64_t count : {0, 1, 3, 200}) {
    std::vector<int32_t> pairs(static_cast<size_t>(2 * count));
    for (int32_t& id : pairs) id = static_cast<int32_t>(generator() % kBlocks);
    program.copy_blocks(pairs.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = pairs[static_cast<size_t>(2 * i)], to = pairs[static_cast<size_t>(2 * i + 1)];
      if (from != to) std::copy_n(pool.begin() + from * bytes, bytes, pool.begin() + to * bytes);
    }
    read_all();
    expect(found == pool, "copies are made in their order", threads);
  }

  for (const int32_t bad : {-1, static_cast<int32_t>(kBlocks)}) {
    const int32_t pairs[] = {0, 1, 2, bad};
    bool is_refused = false;
    try {
      program.copy_blocks(pairs, 2);
    } catch (const std::invalid_argument&) {
      is_refused = true;
    }
    expect(is_refused, "an id outside the pool is refused", threads);
  }
  read_all();
  expect(found == pool, "what is refused changes nothing", threads);
}

}  // namespace

int main() {
  for (const int threads : {1, 3}) {
    test(threads, 8, KvKind::kF16);
    test(threads, 64, KvKind::kF16);
    test(threads, 16, KvKind::kInt8);
  }
  std::printf(failures == 0 ? "blocks_test: all is well\n" : "blocks_test: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
