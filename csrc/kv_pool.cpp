#include "kv_pool.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace octavo {

KvPool::KvPool(int64_t num_layers, int64_t num_blocks, int64_t block_bytes)
    : num_planes_(2 * num_layers),
      num_blocks_(num_blocks),
      block_bytes_(block_bytes),
      mapping_(static_cast<size_t>(2 * num_layers * num_blocks * block_bytes)) {
  toucher_ = std::thread([this] { touch_pages(); });
}

KvPool::~KvPool() {
  stopping_.store(true);
  toucher_.join();
}

void KvPool::touch_pages() {
#ifdef __linux__
  setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), 19);
#endif
  constexpr size_t kPage = 4096;
  for (size_t at = 0; at < mapping_.size() && !stopping_.load(std::memory_order_relaxed); at += kPage) {
    // An atomic or with nothing: faults the page in and can lose no K or V that a step writes meanwhile.
    auto* word = reinterpret_cast<uint32_t*>(mapping_.data() + at);
    std::atomic_ref<uint32_t>(*word).fetch_or(0, std::memory_order_relaxed);
  }
}

}  // namespace octavo
