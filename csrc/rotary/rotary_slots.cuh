// Adds what the blocks of a backward left in slots of their own, in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include "../common/cuda.cuh"

namespace fastrpe {
namespace rotary {

template <typename A>
struct Slots {
  static constexpr int columns = 32, groups = 16;  // a block adds `groups` parts of the slots side by side
  const A* from;                                   // (sets, slots, n)
  A* to;                                           // (sets, n)
  int64_t sets, slots, n;

  __host__ __device__ int64_t tiles() const {
    return (n + columns - 1) / columns;
  }
};

// Grid (tiles of all sets of both).
template <typename A>
__global__ void __launch_bounds__(Slots<A>::columns* Slots<A>::groups)
    add_slots_kernel(const Slots<A> first, const Slots<A> second) {
  constexpr int columns = Slots<A>::columns, groups = Slots<A>::groups;
  __shared__ A sums[groups][columns];
  const int64_t of_first = first.sets * first.tiles();
  const bool is_first = blockIdx.x < of_first;
  const A* from = is_first ? first.from : second.from;
  A* to = is_first ? first.to : second.to;
  const int64_t slots = is_first ? first.slots : second.slots, n = is_first ? first.n : second.n;
  const int64_t tiles = is_first ? first.tiles() : second.tiles();
  const int64_t tile = is_first ? blockIdx.x : blockIdx.x - of_first, set = tile / tiles;
  const int lane = threadIdx.x % columns, group = threadIdx.x / columns;
  const int64_t column = (tile - set * tiles) * columns + lane;
  const bool inside = column < n;
  A sum = 0;
  if (inside) {
    from += set * slots * n + column;
#pragma unroll 8
    for (int64_t i = group; i < slots; i += groups) {
      sum += from[i * n];
    }
  }
  sums[group][lane] = sum;
  __syncthreads();
  if (group == 0 && inside) {
    for (int i = 1; i < groups; ++i) {
      sum += sums[i][lane];
    }
    to[set * n + column] = sum;
  }
}

template <typename A>
void add_slots(const Slots<A>& first, const Slots<A>& second, cudaStream_t stream) {
  const int64_t blocks = first.sets * first.tiles() + second.sets * second.tiles();
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "rotate_bwd: positions are too many for one launch");
  if (blocks > 0) {
    add_slots_kernel<A><<<blocks, Slots<A>::columns * Slots<A>::groups, 0, stream>>>(first, second);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace rotary
}  // namespace fastrpe
