// Memory straight from the system: zero pages that cost nothing until touched, huge ones where that helps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace octavo {

// A private anonymous mapping, unmapped with its owner. Reads as zero.
class Mapping {
 public:
  Mapping() = default;
  explicit Mapping(size_t bytes);  // throws std::bad_alloc
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out 64-byte aligned pieces of large mappings, freed all at once: thousands of small weights share huge pages.
class Arena {
 public:
  uint8_t* take(size_t bytes);
  size_t bytes_taken() const { return bytes_taken_; }

 private:
  std::vector<Mapping> chunks_;
  size_t used_ = 0;  // of the last chunk
  size_t bytes_taken_ = 0;
};

}  // namespace octavo
