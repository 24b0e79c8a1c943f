#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "rotary_basis.cuh"
#include "rotary_cuda.h"

// y = R(p) P x, or its adjoint P^T R(p)^T x, for 16-bit values, in one pass over memory, on Hopper's tensor cores.
//
// A block walks through tiles of 64 tokens of one item (a sequence and head), the items of a tile of tokens one after
// another, so that its threads keep their cosines and sines in registers; the next tiles are copied to shared memory
// meanwhile. The basis lies in shared memory too, where the tensor cores read it. The columns of the product are dealt
// such that a thread finds both coordinates of a plane in its own registers and stores 16 bytes at a time.
namespace fastrpe {
namespace rotary {
namespace {

template <int D, int Coords>
struct Layout : Memory<D, Coords> {
  using Of = Memory<D, Coords>;
  static constexpr int stages = D > 64 ? 3 : 4;
  static constexpr int blocks = D > 64 ? 2 : 4;  // of a multiprocessor
  static constexpr size_t bytes =
      16 * (Of::basis + stages * (Of::values + Of::positions + Of::tile_info) + Of::frequencies);
};

template <typename T, int D, bool Interleaved, bool Adjoint, int Coords>
__global__ void __launch_bounds__(2 * D, Layout<D, Coords>::blocks) rotate_basis_kernel(const BasisArgs<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Layout<D, Coords>;
  extern __shared__ __align__(1024) char memory[];
  uint4* basis = reinterpret_cast<uint4*>(memory);
  uint4* stages = basis + Of::basis;
  float* positions = reinterpret_cast<float*>(stages + Of::stages * Of::values);  // of each stage
  Tile<T>* tiles = reinterpret_cast<Tile<T>*>(positions + Of::stages * Of::positions * 4);
  float* frequencies = reinterpret_cast<float*>(tiles + Of::stages);

  uint32_t unit = blockIdx.x * args.share, ahead = unit;
  const uint32_t end = min(unit + args.share, args.units);
  Walk walk(args, unit);
  int set = walk.set;
  bool fresh = true;
  const auto start_next = [&] {
    if (ahead < end) {
      const uint32_t i = ahead % Of::stages;
      fetch<D, Coords>(args, walk, fresh, stages + i * Of::values, positions + i * Of::positions * 4, tiles + i);
      fresh = walk.advance(args);
      ++ahead;
    }
  };
  const auto prepare = [&] {
    fill_basis<T, D, Interleaved, Adjoint>(args.basis + set * args.basis_set, basis);
    fill_frequencies<D>(args, set, frequencies);
  };
  start_next();
  prepare();
  copies_end();
#pragma unroll
  for (int i = 2; i < Of::stages; ++i) {
    start_next();
    copies_end();
  }
  const Kept kept = Adjoint ? Kept::of_pieces<D, Interleaved>() : Kept::of_columns<D, Interleaved>();
  float c[2][8], s[2][8];

  for (; unit < end; ++unit) {
    uint4* stage = stages + unit % Of::stages * Of::values;
    const float* coordinates = positions + unit % Of::stages * Of::positions * 4;
    copies_wait<Of::stages - 2>();
    copies_visible();
    __syncthreads();  // this stage is there, and everyone has left the one before
    const Tile<T> now = tiles[unit % Of::stages];
    if (now.set != set) {
      set = now.set;
      prepare();
      copies_end();
      copies_wait<0>();
      copies_visible();
      __syncthreads();
    }
    if constexpr (Adjoint) {
      if (now.fresh) {
        keep_phases<Coords>(args, frequencies, coordinates, kept, c, s);
      }
      turn_in_place<D, Interleaved>(stage, now, kept, c, s);
      copies_visible();
      __syncthreads();
    }
    float sums[32];
    products_begin();
    multiply_basis<D, Adjoint, T>(sums, stage, basis);
    products_end();
    start_next();
    copies_end();
    if (!Adjoint && now.fresh) {
      keep_phases<Coords>(args, frequencies, coordinates, kept, c, s);
    }
    products_wait(sums);
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float a[8], b[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        a[j] = sums[j * 4 + i * 2];
        b[j] = sums[j * 4 + i * 2 + 1];
        if constexpr (!Adjoint) {
          turn(a[j], b[j], c[i][j], s[i][j]);
        }
      }
      const int token = row + i * 8;
      if (now.from <= token && token < now.until) {
        store_row<D, Adjoint || Interleaved>(now.y + token * D, a, b);
      }
    }
    copy_prefix<D>(stage, now);
  }
#endif
}

}  // namespace

std::tuple<Tensor, Tensor> rotate_basis_cuda(const Tensor& q, const Tensor& k, const Tensor& positions,
                                             const Tensor& freqs, const Tensor& basis, bool interleaved, bool inverse,
                                             double factor, int64_t prefix) {
  const char* op = "rotate_basis";
  const BasisProblem problem(op, q, k, positions, freqs, basis, prefix);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor yq = new_empty_like(q), yk = new_empty_like(k);
  if (problem.tiles() == 0) {
    return {yq, yk};
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    BasisArgs<T> args = problem.args<T>(op, q, k, positions, freqs, basis, factor, inverse, yq, yk);
    args.units = static_cast<uint32_t>(problem.tiles());
    problem.dispatch(interleaved, [&](auto d, auto layout, auto coords) {
      constexpr int D = d, Coords = coords;
      constexpr bool Interleaved = layout;
      const auto kernel = inverse ? rotate_basis_kernel<T, D, Interleaved, true, Coords>
                                  : rotate_basis_kernel<T, D, Interleaved, false, Coords>;
      const size_t bytes = Layout<D, Coords>::bytes;
      // Blocks of more tiles spread over memory, which is slow then; blocks of fewer spend their time on the basis.
      const int64_t resident = attribute(q, cudaDevAttrMultiProcessorCount) * Layout<D, Coords>::blocks;
      args.share = std::max(D > 64 ? 8 : 16, ceil_div(args.units, 8 * resident));
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
      kernel<<<ceil_div(args.units, args.share), 2 * D, bytes, current_stream(q)>>>(args);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  };
  q.scalar_type() == ScalarType::BFloat16 ? run(BFloat16{}) : run(Half{});
  return {yq, yk};
}

}  // namespace rotary
}  // namespace fastrpe
