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

// What the captures of a run share: memory, and the stream by which libtorch tells whether memory that one of them left may serve
// another. A graph leaves nothing of worth in it from one replay to the next.
struct Pool {
  c10::DeviceIndex device;
  c10::cuda::CUDAStream stream;
  at::cuda::MempoolId_t id = at::cuda::graph_pool_handle();

  explicit Pool(c10::DeviceIndex device) : device(device), stream(c10::cuda::getStreamFromPool(false, device)) {}
};

struct Graph {
  c10::DeviceIndex device;
  // Named here because a capture that failed has to be ended by name.
  at::cuda::MempoolId_t pool;
  at::cuda::CUDAGraph graph;
  std::optional<c10::cuda::CUDAStream> last;

  explicit Graph(const Pool &pool) : device(pool.device), pool(pool.id) {}

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
    // What was never begun throws, and is not released: other graphs may have their memory there.
    attempt([&] {
      c10::cuda::CUDACachingAllocator::endAllocateToPool(device, pool);
      c10::cuda::CUDACachingAllocator::releasePool(device, pool);
    });
    attempt([&] {
      at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(pool);
      at::getHostAllocator(at::kCUDA)->release_pool(pool);
    });
  }
};

} // namespace

extern "C" {

void graphs_free_error(char *error) {
  if (error != no_memory) std::free(error);
}

char *graphs_pool_make(int device, void **pool) {
  return guarded([&] { *pool = new Pool(static_cast<c10::DeviceIndex>(device)); });
}

// After the last of its graphs.
void graphs_pool_free(void *pool) { delete static_cast<Pool *>(pool); }

// From here to graphs_side_leave this thread's work on the device goes to the pool's stream beside the current one, which it waits for.
// A capture cannot be on the default stream.
char *graphs_side_enter(void *pool, void **side) {
  return guarded([&] {
    auto *ours = static_cast<Pool *>(pool);
    c10::cuda::getCurrentCUDAStream(ours->device).synchronize();
    *side = new c10::cuda::CUDAStreamGuard(ours->stream);
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
char *graphs_begin(void *pool, void **graph) {
  return guarded([&] {
    auto made = std::make_unique<Graph>(*static_cast<Pool *>(pool));
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

// Waits for the last replay, and gives its memory back where it was the pool's last: nothing else can use what is left in it.
char *graphs_free(void *graph) {
  std::unique_ptr<Graph> ours(static_cast<Graph *>(graph));
  return guarded([&] {
    if (ours->last) ours->last->synchronize();
    ours.reset();
    c10::cuda::CUDACachingAllocator::emptyCache();
  });
}

} // extern "C"
