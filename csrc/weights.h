// The weights of one Program, repacked for the kernels: what pack.cpp fills, in memory of their own.
#pragma once

#include <functional>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "thread_pool.h"

namespace octavo {

class Weights {
 public:
  // Pack on all threads of the pool; the view's arrays may go afterwards. Returns the weight's number.
  int add(const GroupedView& view, ThreadPool& pool);
  int add(const DenseView& view, ThreadPool& pool);
  int add_vector(const float* values, int64_t count);

  const PackedWeight& matrix(int id) const { return matrices_.at(static_cast<size_t>(id)); }
  const float* vector(int id) const { return vectors_.at(static_cast<size_t>(id)).data; }
  int64_t vector_size(int id) const { return vectors_.at(static_cast<size_t>(id)).count; }
  size_t bytes() const { return arena_.bytes_taken(); }

 private:
  struct Vector {
    const float* data;
    int64_t count;
  };
  template <typename View>
  int pack(const View& view, PackedWeight weight, ThreadPool& pool);

  Arena arena_;
  std::vector<PackedWeight> matrices_;
  std::vector<Vector> vectors_;
};

}  // namespace octavo
