#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>

namespace octavo {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kChunk = size_t{32} << 20;

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

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
