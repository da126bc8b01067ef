#include "weights.h"

#include <algorithm>
#include <cstring>

namespace octavo {
namespace {

constexpr int64_t kPanelsPerItem = 8;

template <typename View>
class PackJob final : public Job {
 public:
  PackJob(const View& view, PackedWeight* weight) : view_(view), weight_(weight), panels_((view.n + kPanel - 1) / kPanel) {}

  int64_t num_stages() const override { return 1; }
  int64_t num_items(int64_t) const override { return (panels_ + kPanelsPerItem - 1) / kPanelsPerItem; }
  void work(int64_t, int64_t item, int) override {
    const int64_t begin = item * kPanelsPerItem;
    pack_panels(view_, weight_, begin, std::min(panels_, begin + kPanelsPerItem));
  }

 private:
  const View& view_;
  PackedWeight* weight_;
  int64_t panels_;
};

}  // namespace

template <typename View>
int Weights::pack(const View& view, PackedWeight weight, ThreadPool& pool) {
  PackJob<View> job(view, &weight);
  pool.run(job);
  matrices_.push_back(weight);
  return static_cast<int>(matrices_.size()) - 1;
}

int Weights::add(const GroupedView& view, ThreadPool& pool) {
  return pack(view, describe(view, arena_.take(packed_bytes(describe(view, nullptr)))), pool);
}

int Weights::add(const DenseView& view, ThreadPool& pool) {
  return pack(view, describe(view, arena_.take(packed_bytes(describe(view, nullptr)))), pool);
}

int Weights::add_vector(const float* values, int64_t count) {
  // Padded by a vector register, so that kernels may read whole ones.
  auto* data = reinterpret_cast<float*>(arena_.take((static_cast<size_t>(count) + 16) * sizeof(float)));
  std::memcpy(data, values, static_cast<size_t>(count) * sizeof(float));
  vectors_.push_back({data, count});
  return static_cast<int>(vectors_.size()) - 1;
}

}  // namespace octavo
