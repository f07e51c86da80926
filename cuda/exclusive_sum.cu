#include <cub/device/device_scan.cuh>

#include "queue.cuh"

namespace fff::cuda {
namespace {

size_t sum(void* scratch, size_t bytes, int32_t* values, int64_t count, cudaStream_t stream) {
  check(cub::DeviceScan::ExclusiveSum(scratch, bytes, values, values, count, stream),
        "cub::DeviceScan::ExclusiveSum");
  return bytes;
}

}  // namespace

int64_t exclusive_sum_bytes(int64_t count) {
  return static_cast<int64_t>(sum(nullptr, 0, nullptr, count, nullptr));
}

void exclusive_sum(int32_t* values, int64_t count, void* scratch, cudaStream_t stream) {
  sum(scratch, static_cast<size_t>(exclusive_sum_bytes(count)), values, count, stream);
}

}  // namespace fff::cuda
