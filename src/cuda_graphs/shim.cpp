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
#include <mutex>
#include <optional>
#include <vector>

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

// Streams that no pool has now. cuBLAS keeps memory for each stream that it ever worked on, so they are taken again.
struct Streams {
  std::mutex lock;
  std::vector<c10::cuda::CUDAStream> free;

  static Streams &all() {
    static auto &all = *new Streams; // Not to be destroyed before the last pool.
    return all;
  }

  static c10::cuda::CUDAStream take(c10::DeviceIndex device) {
    auto &streams = all();
    std::lock_guard<std::mutex> guard(streams.lock);
    for (auto stream = streams.free.begin(); stream != streams.free.end(); ++stream) {
      if (stream->device_index() == device) {
        auto taken = *stream;
        streams.free.erase(stream);
        return taken;
      }
    }
    return c10::cuda::getStreamFromPool(false, device);
  }

  static void put(c10::cuda::CUDAStream stream) {
    auto &streams = all();
    std::lock_guard<std::mutex> guard(streams.lock);
    streams.free.push_back(stream);
  }
};

// What the captures of a run share: memory, and the stream by which libtorch tells whether memory that one of them left may serve
// another. A graph leaves nothing of worth in it from one replay to the next, so that they only must not be at work at the same time.
struct Pool {
  c10::DeviceIndex device;
  c10::cuda::CUDAStream stream;
  at::cuda::MempoolId_t id = at::cuda::graph_pool_handle();
  std::mutex lock;
  // Where the last replay is.
  std::optional<c10::cuda::CUDAStream> last;

  explicit Pool(c10::DeviceIndex device) : device(device), stream(Streams::take(device)) {}

  ~Pool() {
    attempt([&] { Streams::put(stream); });
  }

  void wait() {
    std::lock_guard<std::mutex> guard(lock);
    if (last) last->synchronize();
  }

  // A replay behind the one before, also where that was on another stream.
  void replay(at::cuda::CUDAGraph &graph) {
    std::lock_guard<std::mutex> guard(lock);
    auto current = c10::cuda::getCurrentCUDAStream(device);
    if (last && *last != current) last->synchronize();
    graph.replay();
    last = current;
  }
};

// libtorch enters each graph in a set of the device's one generator as its capture begins, and takes it out as it is destroyed, without a
// lock: threads with graphs of their own would be in it at once. Held for that alone, not for what is captured.
std::mutex &registry() {
  static auto &registry = *new std::mutex; // Not to be destroyed before the last graph.
  return registry;
}

struct Captured : at::cuda::CUDAGraph {
  bool ended() const { return capture_ended_; }

  // After a capture that failed. The generator would take all later draws on the device, also those of other graphs, for part of the
  // capture; and a graph that failed before it was entered in the generator's set would end the process as it is taken out.
  void forget() {
    for (auto &state : captured_generator_states_) {
      state.first->capturing_ = false;
      state.first->registered_graphs_.insert(this);
    }
  }
};

struct Graph {
  // Lives longer.
  Pool &pool;
  Captured graph;

  explicit Graph(Pool &pool) : pool(pool) {}

  // What libtorch leaves undone where a capture fails: its stream may go on to capture, its allocators would go on to serve the stream from
  // the pool, and what `forget` is for. `begun`: whether the pool is known to have been taken into use.
  void abandon(bool begun) noexcept {
    if (graph.ended()) return;
    attempt([&] {
      auto status = cudaStreamCaptureStatusNone;
      if (cudaStreamIsCapturing(pool.stream, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone) {
        cudaGraph_t rest = nullptr;
        cudaStreamEndCapture(pool.stream, &rest);
        if (rest) cudaGraphDestroy(rest);
      }
      cudaGetLastError(); // Or the next call would be told.
    });
    attempt([&] { graph.forget(); });
    // Ending throws where it was not begun, or has ended. What was not begun is not released: other graphs may have their memory there.
    bool device_begun = begun, host_begun = begun;
    attempt([&] {
      c10::cuda::CUDACachingAllocator::endAllocateToPool(pool.device, pool.id);
      device_begun = true;
    });
    attempt([&] {
      at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(pool.id);
      host_begun = true;
    });
    if (device_begun) attempt([&] { c10::cuda::CUDACachingAllocator::releasePool(pool.device, pool.id); });
    if (host_begun) attempt([&] { at::getHostAllocator(at::kCUDA)->release_pool(pool.id); });
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
    std::lock_guard<std::mutex> guard(registry());
    auto made = std::make_unique<Graph>(*static_cast<Pool *>(pool));
    try {
      made->graph.capture_begin(made->pool.id, cudaStreamCaptureModeThreadLocal);
    } catch (...) {
      made->abandon(false);
      throw;
    }
    *graph = made.release();
  });
}

char *graphs_end(void *graph) {
  return guarded([&] {
    std::lock_guard<std::mutex> guard(registry());
    auto *ours = static_cast<Graph *>(graph);
    try {
      ours->graph.capture_end();
    } catch (...) {
      ours->abandon(true);
      throw;
    }
  });
}

char *graphs_replay(void *graph) {
  return guarded([&] {
    auto *ours = static_cast<Graph *>(graph);
    ours->pool.replay(ours->graph);
  });
}

// Waits for the last replay, and gives its memory back where it was the pool's last: nothing else can use what is left in it.
char *graphs_free(void *graph) {
  std::unique_ptr<Graph> ours(static_cast<Graph *>(graph));
  char *waited = guarded([&] { ours->pool.wait(); });
  char *freed = guarded([&] {
    {
      std::lock_guard<std::mutex> guard(registry());
      ours.reset();
    }
    c10::cuda::CUDACachingAllocator::emptyCache();
  });
  // One message is enough.
  if (!waited) return freed;
  graphs_free_error(freed);
  return waited;
}

} // extern "C"
