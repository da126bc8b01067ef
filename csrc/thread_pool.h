// One pool of threads that works through a job: stages of items, each stage after the one before.
//
// Threads take items from one atomic counter, so a thread that the system stops holds up nobody unless it holds an item.
// Whoever ends the last item of a stage opens the next one; nobody waits for idle threads to arrive. A stage of one item
// is done at once by whoever opens it: small work costs no hand-over.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace octavo {

// Work of the pool. Every call is made while the stage is open; `thread` is in [0, num_threads).
class Job {
 public:
  virtual ~Job() = default;
  virtual int64_t num_stages() const = 0;
  virtual int64_t num_items(int64_t stage) const = 0;  // fewer than 2^20; may be 0
  virtual void work(int64_t stage, int64_t item, int thread) = 0;
};

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // the caller of run included
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Do the whole job; the caller works too, as thread 0. Not reentrant.
  void run(Job& job);

 private:
  // The ticket is (stage number << 20) | items not taken yet. Stage numbers never repeat, and the odd one past a job's
  // last stage stands for "nothing to do"; so whoever takes an item by compare-and-swap knows that its stage is open,
  // and reads job_ and first_stage_ safely until it has ended that item.
  static constexpr int kItemBits = 20;

  bool take(int64_t* stage, int64_t* item);
  void finish_item(int64_t stage, int thread);
  void open_from(int64_t stage, int thread);
  void work_until_idle(int thread);
  void wait_for_change(uint64_t seen);
  void publish(uint64_t ticket);
  void worker(int thread);

  const int num_threads_;
  int num_spins_;
  Job* job_ = nullptr;
  uint64_t first_stage_ = 0;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> unfinished_{0};
  alignas(64) std::atomic<uint64_t> end_ticket_{0};  // the ticket that says the job is done
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> threads_;
};

}  // namespace octavo
