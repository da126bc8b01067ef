#include "memory.h"

#include <sys/mman.h>

#ifdef __linux__
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <bit>
#include <new>
#include <utility>

namespace octavo {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kChunk = size_t{32} << 20;

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

#ifdef __linux__
// Spreads pages over the NUMA nodes that we may use, if there are several and nobody (numactl) has said otherwise: threads take
// work as it comes, so no thread owns a part that could lie beside it, and all nodes' bandwidth serves all threads. A wish too:
// containers often forbid it.
void interleave(void* data, size_t size) {
  constexpr size_t kWords = 16, kWordBits = 8 * sizeof(unsigned long);
  int mode = MPOL_DEFAULT;
  unsigned long nodes[kWords] = {};
  if (syscall(SYS_get_mempolicy, &mode, nullptr, 0, nullptr, 0) != 0 || mode != MPOL_DEFAULT) return;
  if (syscall(SYS_get_mempolicy, nullptr, nodes, kWords * kWordBits, nullptr, MPOL_F_MEMS_ALLOWED) != 0) return;
  int count = 0;
  for (const unsigned long word : nodes) count += std::popcount(word);
  if (count > 1) syscall(SYS_mbind, data, size, MPOL_INTERLEAVE, nodes, kWords * kWordBits, 0);
}
#endif

}  // namespace

Mapping::Mapping(size_t bytes) {
  if (bytes == 0) return;
  size_ = round_up(bytes, bytes >= kHugePage ? kHugePage : 4096);
  void* data = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(data);
#ifdef MADV_HUGEPAGE
  if (size_ >= kHugePage) madvise(data_, size_, MADV_HUGEPAGE);  // a wish: fewer misses of the TLB
#endif
#ifdef __linux__
  if (size_ >= kHugePage) interleave(data_, size_);
#endif
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, size_);
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

uint8_t* Arena::take(size_t bytes) {
  bytes = round_up(bytes, 64);
  if (chunks_.empty() || used_ + bytes > chunks_.back().size()) {
    chunks_.emplace_back(std::max(kChunk, bytes));
    used_ = 0;
  }
  uint8_t* piece = chunks_.back().data() + used_;
  used_ += bytes;
  bytes_taken_ += bytes;
  return piece;
}

}  // namespace octavo
