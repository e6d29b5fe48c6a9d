// Each stream has a ring of counters, of which a launch takes the next ones.
// Streams belong to threads: a thread that ends leaves its rings to those that
// start.

#include "mlx/backend/cuda/quantized_sdpa_counters.h"

#include <mutex>
#include <unordered_map>
#include <vector>

#include "mlx/backend/cuda/quantized_sdpa_host.h"

namespace mlx::core::quantized_sdpa {

namespace {

struct Ring {
  // Of far more launches than a stream has in flight.
  static constexpr int size = 1 << 18;
  array counters;
  int next;

  uint32_t* take(int n) {
    if (n > size) {
      fail("A launch has too many blocks.");
    }
    next = next + n > size ? 0 : next;
    next += n;
    return gpu_ptr<uint32_t>(counters) + next - n;
  }
};

// By device. Never freed: the driver may be gone when the process ends.
struct SpareRings {
  std::mutex mutex;
  std::unordered_map<int, std::vector<Ring>> rings;

  static SpareRings& instance() {
    static auto* rings = new SpareRings;
    return *rings;
  }

  void put(int device, Ring ring) {
    std::lock_guard lock(mutex);
    rings[device].push_back(std::move(ring));
  }

  std::optional<Ring> take(int device) {
    std::lock_guard lock(mutex);
    auto& spare = rings[device];
    if (spare.empty()) {
      return std::nullopt;
    }
    auto ring = std::move(spare.back());
    spare.pop_back();
    return ring;
  }
};

class ThreadRings {
 public:
  ~ThreadRings() {
    for (auto& [stream, used] : rings_) {
      SpareRings::instance().put(used.device, std::move(used.ring));
    }
  }

  Ring& of(cu::CommandEncoder& encoder, const Stream& s) {
    auto found = rings_.find(s.index);
    if (found == rings_.end()) {
      int device = encoder.device().cuda_device();
      Used used{device, make_ring(encoder, device)};
      found = rings_.emplace(s.index, std::move(used)).first;
    }
    return found->second.ring;
  }

 private:
  struct Used {
    int device;
    Ring ring;
  };

  static Ring make_ring(cu::CommandEncoder& encoder, int device) {
    if (auto spare = SpareRings::instance().take(device)) {
      // The thread that ended may have left launches in flight.
      wait_for_cuda(encoder.device());
      return std::move(*spare);
    }
    array counters({Ring::size}, uint32, nullptr, {});
    counters.set_data(allocator::malloc(counters.nbytes()));
    clear_cuda(encoder, gpu_ptr<void>(counters), Ring::size);
    return {counters, 0};
  }

  std::unordered_map<int, Used> rings_;
};

} // namespace

uint32_t* take_counters(cu::CommandEncoder& encoder, const Stream& s, int n) {
  static thread_local ThreadRings rings;
  return rings.of(encoder, s).take(n);
}

} // namespace mlx::core::quantized_sdpa
