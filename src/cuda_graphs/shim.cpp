// libtorch's CUDA graphs for C, as a shared object of its own: it is opened after libtorch_cuda, whose symbols it wants.
// Every function returns null, or what went wrong, to be freed by graphs_free_error.

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>

namespace {

char no_memory[] = "not enough memory for an error's message";

char *message(const char *text) noexcept {
  char *copy = strdup(text);
  return copy ? copy : no_memory;
}

template <typename Work> char *guarded(Work work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const std::exception &error) {
    return message(error.what());
  } catch (...) {
    return message("an exception of an unknown kind");
  }
}

template <typename Work> void attempt(Work work) noexcept {
  try {
    work();
  } catch (...) {
  }
}

struct Graph {
  c10::DeviceIndex device;
  // A pool of its own, named here because a capture that failed has to be ended by name.
  at::cuda::MempoolId_t pool = at::cuda::graph_pool_handle();
  at::cuda::CUDAGraph graph;
  std::optional<c10::cuda::CUDAStream> last;

  explicit Graph(c10::DeviceIndex device) : device(device) {}

  // What libtorch leaves undone where a capture fails: its allocators would go on to serve the stream from the pool, and its
  // generator would take all later draws on the device for part of the capture. A clone's state is not within one.
  void abandon() noexcept {
    bool ended = false;
    attempt([&] {
      graph.pool(); // throws unless the capture ended well
      ended = true;
    });
    if (ended) return;
    attempt([&] {
      auto generator = at::cuda::detail::getDefaultCUDAGenerator(device);
      generator.graphsafe_set_state(generator.clone());
    });
    attempt([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(device, pool); });
    attempt([&] { at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(pool); });
    attempt([&] { c10::cuda::CUDACachingAllocator::releasePool(device, pool); });
    attempt([&] { at::getHostAllocator(at::kCUDA)->release_pool(pool); });
  }
};

} // namespace

extern "C" {

void graphs_free_error(char *error) {
  if (error != no_memory) std::free(error);
}

// From here to graphs_side_leave this thread's work on the device goes to a stream beside the current one, which it waits for.
// A capture cannot be on the default stream.
char *graphs_side_enter(int device, void **side) {
  return guarded([&] {
    auto index = static_cast<c10::DeviceIndex>(device);
    c10::cuda::getCurrentCUDAStream(index).synchronize();
    *side = new c10::cuda::CUDAStreamGuard(c10::cuda::getStreamFromPool(false, index));
  });
}

// Between a warm-up and a capture: the memory of the one is not needed beside that of the other.
char *graphs_side_ready(void *side) {
  return guarded([&] {
    static_cast<c10::cuda::CUDAStreamGuard *>(side)->current_stream().synchronize();
    c10::cuda::CUDACachingAllocator::emptyCache();
  });
}

char *graphs_side_leave(void *side) {
  std::unique_ptr<c10::cuda::CUDAStreamGuard> guard(static_cast<c10::cuda::CUDAStreamGuard *>(side));
  return guarded([&] { guard->current_stream().synchronize(); });
}

// Other threads may use the GPU meanwhile, hence the mode: what they do is none of this capture's business. The thread of
// autograd adds to it all the same, as it queues its kernels on this stream.
char *graphs_begin(int device, void **graph) {
  return guarded([&] {
    auto made = std::make_unique<Graph>(static_cast<c10::DeviceIndex>(device));
    try {
      made->graph.capture_begin(made->pool, cudaStreamCaptureModeThreadLocal);
    } catch (...) {
      made->abandon();
      throw;
    }
    *graph = made.release();
  });
}

char *graphs_end(void *graph) {
  return guarded([&] {
    auto *ours = static_cast<Graph *>(graph);
    try {
      ours->graph.capture_end();
    } catch (...) {
      ours->abandon();
      throw;
    }
  });
}

char *graphs_replay(void *graph) {
  return guarded([&] {
    auto *ours = static_cast<Graph *>(graph);
    ours->graph.replay();
    ours->last = c10::cuda::getCurrentCUDAStream(ours->device);
  });
}

// Waits for the last replay, and gives its memory back: nothing else can use what is left in a graph's pool.
char *graphs_free(void *graph) {
  std::unique_ptr<Graph> ours(static_cast<Graph *>(graph));
  return guarded([&] {
    if (ours->last) ours->last->synchronize();
    ours.reset();
    c10::cuda::CUDACachingAllocator::emptyCache();
  });
}

} // extern "C"
