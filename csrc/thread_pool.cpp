#include "thread_pool.h"

#include <chrono>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace octavo {
namespace {

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spinning bridges the short waits inside a step; between steps threads sleep, for the cores belong to others too.
constexpr int64_t kSpinNanoseconds = 50'000;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads) {
  threads_.reserve(static_cast<size_t>(num_threads - 1));
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { worker(i); });
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  {
    std::lock_guard lock(mutex_);
    changed_.notify_all();
  }
  for (auto& thread : threads_) thread.join();
}

void ThreadPool::run(Job& job) {
  const uint64_t current = ticket_.load(std::memory_order_acquire) >> kItemBits;
  job_ = &job;
  first_stage_ = current + 1;
  const auto num_stages = static_cast<uint64_t>(job.num_stages());
  const uint64_t end = (first_stage_ + num_stages) << kItemBits;
  end_ticket_.store(end, std::memory_order_relaxed);
  open_from(0, 0);
  for (;;) {
    work_until_idle(0);
    const uint64_t seen = ticket_.load(std::memory_order_acquire);
    if (seen == end) return;
    if ((seen & ((1u << kItemBits) - 1)) == 0) wait_for_change(seen);
  }
}

bool ThreadPool::take(int64_t* stage, int64_t* item) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t left = ticket & ((1u << kItemBits) - 1);
    if (left == 0) return false;
    if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      *stage = static_cast<int64_t>((ticket >> kItemBits) - first_stage_);
      *item = job_->num_items(*stage) - static_cast<int64_t>(left);
      return true;
    }
  }
}

void ThreadPool::finish_item(int64_t stage, int thread) {
  if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) open_from(stage + 1, thread);
}

// Called by the one thread that knows that every stage before `stage` is done.
void ThreadPool::open_from(int64_t stage, int thread) {
  const int64_t num_stages = job_->num_stages();
  for (; stage < num_stages; ++stage) {
    const int64_t items = job_->num_items(stage);
    if (items > 1 && num_threads_ > 1) {
      unfinished_.store(items, std::memory_order_relaxed);
      publish(((first_stage_ + static_cast<uint64_t>(stage)) << kItemBits) | static_cast<uint64_t>(items));
      return;
    }
    for (int64_t item = 0; item < items; ++item) job_->work(stage, item, thread);
  }
  publish(end_ticket_.load(std::memory_order_relaxed));
}

void ThreadPool::publish(uint64_t ticket) {
  ticket_.store(ticket, std::memory_order_seq_cst);
  if (num_sleeping_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard lock(mutex_);
    changed_.notify_all();
  }
}

void ThreadPool::work_until_idle(int thread) {
  int64_t stage, item;
  while (take(&stage, &item)) {
    job_->work(stage, item, thread);
    finish_item(stage, thread);
  }
}

void ThreadPool::wait_for_change(uint64_t seen) {
  const int64_t deadline = now_ns() + kSpinNanoseconds;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ticket_.load(std::memory_order_acquire) != seen) return;
      relax();
    }
  } while (now_ns() < deadline);
  std::unique_lock lock(mutex_);
  num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
  while (ticket_.load(std::memory_order_seq_cst) == seen && !stopping_.load()) changed_.wait(lock);
  num_sleeping_.fetch_sub(1, std::memory_order_relaxed);
}

void ThreadPool::worker(int thread) {
  while (!stopping_.load(std::memory_order_relaxed)) {
    work_until_idle(thread);
    const uint64_t seen = ticket_.load(std::memory_order_acquire);
    if ((seen & ((1u << kItemBits) - 1)) == 0) wait_for_change(seen);
  }
}

}  // namespace octavo
