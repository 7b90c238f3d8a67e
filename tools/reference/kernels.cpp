// What a program has its GPU do: the time of each kernel, by name, summed up and written with tabs between when the program ends.
//
// Loaded by CUDA itself into any program that is started with CUDA_INJECTION64_PATH naming this library; KERNELS names the
// file to write. Kernels within a CUDA graph are counted one by one. See kernels.py, which builds and reads it.

#include <cupti.h>
#include <cxxabi.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace {

struct Sum {
    uint64_t count = 0;
    uint64_t nanoseconds = 0;
};

// Never destroyed: CUPTI may hand over a last buffer when the program's own objects are gone.
std::map<std::string, Sum>& sums() {
    static auto* all = new std::map<std::string, Sum>;
    return *all;
}

std::mutex& guard() {
    static auto* one = new std::mutex;
    return *one;
}

void add(const char* name, uint64_t start, uint64_t end) {
    Sum& sum = sums()[name ? name : "?"];
    sum.count += 1;
    sum.nanoseconds += end - start;
}

void CUPTIAPI requested(uint8_t** buffer, size_t* size, size_t* records) {
    constexpr size_t bytes = 8 << 20;
    *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, bytes));
    *size = *buffer ? bytes : 0;
    *records = 0;
}

void CUPTIAPI completed(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
    std::lock_guard<std::mutex> lock(guard());
    CUpti_Activity* record = nullptr;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
            add(kernel->name, kernel->start, kernel->end);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpy6*>(record);
            // To and from the host, whose pages are now here, now there, is loading; a timestep copies on the device.
            add(copy->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_DTOD ? "[memcpy]" : "[memcpy, host]", copy->start, copy->end);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            const auto* set = reinterpret_cast<const CUpti_ActivityMemset4*>(record);
            add("[memset]", set->start, set->end);
        }
    }
    std::free(buffer);
}

std::string demangled(const std::string& name) {
    int status = 0;
    char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    std::string found = status == 0 && readable ? readable : name;
    std::free(readable);
    return found;
}

void write() {
    cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    const char* path = std::getenv("KERNELS");
    std::FILE* file = path ? std::fopen(path, "w") : nullptr;
    if (!file) {
        std::perror("kernels: the file that KERNELS names");
        return;
    }
    std::lock_guard<std::mutex> lock(guard());
    for (const auto& [name, sum] : sums()) {
        std::fprintf(file, "%llu\t%llu\t%s\n", (unsigned long long)sum.count, (unsigned long long)sum.nanoseconds, demangled(name).c_str());
    }
    std::fclose(file);
}

}  // namespace

extern "C" int InitializeInjection() {
    bool well = cuptiActivityRegisterCallbacks(requested, completed) == CUPTI_SUCCESS;
    for (CUpti_ActivityKind kind : {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET}) {
        well = cuptiActivityEnable(kind) == CUPTI_SUCCESS && well;
    }
    if (!well) {
        std::fputs("kernels: CUPTI refused\n", stderr);
    }
    std::atexit(write);
    return 1;
}
