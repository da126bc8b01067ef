// Whole blocks of the KV cache: copied inside the pool, read out of it and written back.
//
// A block is scattered over the pool, one piece for K and one for V of each layer (a plane each). Threads take different
// planes, so that within a plane everything is done in the order asked for.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "program.h"

namespace octavo {
namespace {

// Bytes that make an item worth handing over: copies run at memcpy's speed, twice that with two threads, and waking one costs
// what 0.1 MB does.
constexpr int64_t kBytesPerItem = 512 << 10;

// Does `move(plane, i)` for every plane and, in order, every i below `count`.
template <typename Move>
class BlockJob final : public Job {
 public:
  BlockJob(const KvPool& kv, int64_t count, Move move) : kv_(kv), count_(count), move_(move) {
    const int64_t plane_bytes = std::max<int64_t>(1, count * kv.block_bytes());
    planes_ = std::clamp<int64_t>(kBytesPerItem / plane_bytes, 1, kv.num_planes());
  }

 private:
  int64_t num_stages() const override { return 1; }
  int64_t num_items(int64_t) const override { return divide_up(kv_.num_planes(), planes_); }
  void work(int64_t, int64_t item, int) override {
    const int64_t end = std::min((item + 1) * planes_, kv_.num_planes());
    for (int64_t plane = item * planes_; plane < end; ++plane) {
      for (int64_t i = 0; i < count_; ++i) move_(plane, i);
    }
  }

  const KvPool& kv_;
  const int64_t count_;
  const Move move_;
  int64_t planes_;  // an item
};

}  // namespace

template <typename Move>
void Program::move_blocks(const int32_t* ids, int64_t num_ids, int64_t count, Move move) {
  block_bytes();  // there is a cache
  const std::unique_lock alone(running_, std::try_to_lock);
  if (!alone.owns_lock()) throw std::invalid_argument("another thread is running a step of this program");
  for (int64_t i = 0; i < num_ids; ++i) {
    if (ids[i] < 0 || ids[i] >= kv_->num_blocks()) throw std::invalid_argument("a block id lies outside the KV cache");
  }
  BlockJob job(*kv_, count, move);
  pool_.run(job);
}

int64_t Program::block_bytes() const {
  if (kv_ == nullptr) throw std::invalid_argument("allocate_cache must be called before blocks are moved");
  return kv_->num_planes() * kv_->block_bytes();
}

void Program::copy_blocks(const int32_t* pairs, int64_t count) {
  move_blocks(pairs, 2 * count, count, [this, pairs](int64_t plane, int64_t i) {
    const int32_t from = pairs[2 * i], to = pairs[2 * i + 1];
    if (from != to) std::memcpy(kv_->block(plane, to), kv_->block(plane, from), static_cast<size_t>(kv_->block_bytes()));
  });
}

void Program::read_blocks(const int32_t* ids, int64_t count, uint8_t* out) {
  move_blocks(ids, count, count, [this, ids, out](int64_t plane, int64_t i) {
    const int64_t bytes = kv_->block_bytes();
    std::memcpy(out + (i * kv_->num_planes() + plane) * bytes, kv_->block(plane, ids[i]), static_cast<size_t>(bytes));
  });
}

void Program::write_blocks(const int32_t* ids, int64_t count, const uint8_t* data) {
  move_blocks(ids, count, count, [this, ids, data](int64_t plane, int64_t i) {
    const int64_t bytes = kv_->block_bytes();
    std::memcpy(kv_->block(plane, ids[i]), data + (i * kv_->num_planes() + plane) * bytes, static_cast<size_t>(bytes));
  });
}

}  // namespace octavo
