// Threads that share the pieces of one call. A helper that has nothing to do
// looks out for work a little longer before it sleeps: attention comes once a
// layer, and waking a thread costs as much as a short call.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace mlx::core::quantized_sdpa {

class WorkerPool {
 public:
  // As many helpers as the system allows.
  explicit WorkerPool(int n_helpers) {
    helpers_.reserve(n_helpers);
    try {
      for (int i = 0; i < n_helpers; ++i) {
        helpers_.emplace_back([this] { help(); });
      }
    } catch (const std::exception&) {
    }
  }

  // Calls fn(i) for i in [0, n) on the calling thread and up to n_threads - 1
  // helpers. The first exception is thrown once all have stopped.
  void run(int n, int n_threads, const std::function<void(int)>& fn) {
    int n_helpers = std::min({n, n_threads, int(helpers_.size()) + 1}) - 1;
    Job job{fn, n, n_helpers};
    if (n_helpers > 0) {
      publish(job);
    }
    job.work();
    if (n_helpers > 0) {
      withdraw(job);
    }
    if (job.error) {
      std::rethrow_exception(job.error);
    }
  }

 private:
  struct Job {
    const std::function<void(int)>& fn;
    int n;
    // Helpers that may still join; guarded by the pool's mutex.
    int places;
    std::atomic<int> next{0};
    std::atomic<int> active{0};
    std::mutex error_mutex{};
    std::exception_ptr error{};

    void work() {
      try {
        for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
          fn(i);
        }
      } catch (...) {
        std::lock_guard lock(error_mutex);
        next = n;
        error = error ? error : std::current_exception();
      }
    }
  };

  void publish(Job& job) {
    bool wake;
    {
      std::lock_guard lock(mutex_);
      jobs_.push_back(&job);
      published_.fetch_add(1, std::memory_order_release);
      wake = n_asleep_ > 0;
    }
    if (wake) {
      wake_.notify_all();
    }
  }

  // After this no helper touches the job.
  void withdraw(Job& job) {
    {
      std::lock_guard lock(mutex_);
      std::erase(jobs_, &job);
    }
    while (job.active.load(std::memory_order_acquire) > 0) {
      std::this_thread::yield();
    }
  }

  Job* join() {
    for (auto* job : jobs_) {
      if (job->places > 0) {
        --job->places;
        job->active.fetch_add(1, std::memory_order_relaxed);
        return job;
      }
    }
    return nullptr;
  }

  void help() {
    for (;;) {
      Job* job;
      uint64_t seen;
      {
        std::lock_guard lock(mutex_);
        seen = published_.load(std::memory_order_relaxed);
        job = join();
      }
      if (job) {
        job->work();
        job->active.fetch_sub(1, std::memory_order_release);
      } else if (!look_out(seen)) {
        sleep(seen);
      }
    }
  }

  // Whether something was published before patience ran out.
  bool look_out(uint64_t seen) const {
    auto start = std::chrono::steady_clock::now();
    while (published_.load(std::memory_order_acquire) == seen) {
      if (std::chrono::steady_clock::now() - start > patience_) {
        return false;
      }
      std::this_thread::yield();
    }
    return true;
  }

  void sleep(uint64_t seen) {
    std::unique_lock lock(mutex_);
    ++n_asleep_;
    wake_.wait(lock, [&] { return published_.load() != seen; });
    --n_asleep_;
  }

  static constexpr std::chrono::microseconds patience_{200};

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Job*> jobs_;
  std::atomic<uint64_t> published_{0};
  int n_asleep_{0};
  std::vector<std::thread> helpers_;
};

} // namespace mlx::core::quantized_sdpa
