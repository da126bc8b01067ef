// The KV cache of one Program: [layers][K, then V][blocks], one anonymous mapping.
//
// A thread of low priority touches the pages one after another once the pool is mapped, so that a busy server does not pay for
// page faults inside its steps; nothing waits for it.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "memory.h"

namespace octavo {

class KvPool {
 public:
  KvPool(int64_t num_layers, int64_t num_blocks, int64_t block_bytes);  // bytes of K of one block of one layer
  ~KvPool();
  KvPool(const KvPool&) = delete;
  KvPool& operator=(const KvPool&) = delete;

  int64_t num_blocks() const { return num_blocks_; }
  int64_t num_planes() const { return num_planes_; }    // K and V of each layer
  int64_t block_bytes() const { return block_bytes_; }  // of a block's piece of a plane
  uint8_t* k(int64_t layer) const { return block(2 * layer, 0); }
  uint8_t* v(int64_t layer) const { return block(2 * layer + 1, 0); }
  uint8_t* block(int64_t plane, int64_t id) const { return mapping_.data() + (plane * num_blocks_ + id) * block_bytes_; }

 private:
  void touch_pages();

  int64_t num_planes_;
  int64_t num_blocks_;
  int64_t block_bytes_;
  Mapping mapping_;
  std::atomic<bool> stopping_{false};
  std::thread toucher_;
};

}  // namespace octavo
