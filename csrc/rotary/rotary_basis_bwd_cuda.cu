#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "rotary_basis.cuh"
#include "rotary_cuda.h"
#include "rotary_slots.cuh"

// Gradients of y = R(p) P x in one pass over memory: with z = R(p)^T dy and u = P x,
//
//   dx = P^T z,   dP = sum z x^T,   domega = sum p (z_b u_a - z_a u_b)
//
// over the tokens and items of a set. A block walks through tiles of 64 tokens of one item, the items of a tile
// of tokens one after another, so that its threads keep their cosines and sines in registers; the next tiles are copied
// to shared memory meanwhile. z replaces dy there, and is the left operand of dx as it lies and of dP transposed. A
// block leaves its sums in a slot of its own, and a second kernel adds the slots, so the result is deterministic.
namespace fastrpe {
namespace rotary {
namespace {

template <int D, int Coords>
struct Layout : Memory<D, Coords> {
  using Of = Memory<D, Coords>;
  static constexpr int stages = D > 64 ? 2 : 3;
  static constexpr int blocks = D > 64 ? 1 : 3;  // of a multiprocessor
  static constexpr size_t bytes =
      16 * (2 * Of::basis + stages * (2 * Of::values + Of::positions + Of::tile_info) + Of::frequencies);
};

// Tells kernels apart.
template <int D, bool Interleaved, int Coords>
struct Variant : Layout<D, Coords> {};

template <typename T>
struct GradientArgs : BasisArgs<T> {
  float* dbasis;  // (sets, blocks, D, D), or null where not needed
  float* dfreqs;  // (sets, blocks, C, R), or null where not needed
};

// Adds this thread's part of domega, (Coords, 8 planes), over the block and stores it.
template <int D, int Coords, bool Interleaved>
__device__ __forceinline__ void store_frequency_gradient(float (&sums)[Coords][8], float* shared, int C, float* to) {
  constexpr int R = D / 2;
  const int warp = threadIdx.x % 128 / 32, pass = threadIdx.x / 128, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  __syncthreads();
#pragma unroll
  for (int m = 0; m < Coords; ++m) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        sums[m][j] += __shfl_xor_sync(0xffffffff, sums[m][j], lanes);
      }
      if (g == 0) {
        shared[(warp * Coords + m) * R + plane_of<Interleaved>(pass * 64 + j * 8 + t * 2)] = sums[m][j];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < C * R; i += 2 * D) {
    to[i] = (shared[i] + shared[Coords * R + i]) + (shared[2 * Coords * R + i] + shared[3 * Coords * R + i]);
  }
}

template <typename T, int D, bool Interleaved, int Coords>
__global__ void __launch_bounds__(2 * D, Layout<D, Coords>::blocks)
    rotate_basis_bwd_kernel(const GradientArgs<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Layout<D, Coords>;
  constexpr int R = D / 2;
  extern __shared__ __align__(1024) char memory[];
  uint4* transposed = reinterpret_cast<uint4*>(memory);
  uint4* basis = transposed + Of::basis;
  uint4* stages = basis + Of::basis;                                                  // dy and x of each
  float* positions = reinterpret_cast<float*>(stages + Of::stages * 2 * Of::values);  // of each stage
  Tile<T>* tiles = reinterpret_cast<Tile<T>*>(positions + Of::stages * Of::positions * 4);
  float* frequencies = reinterpret_cast<float*>(tiles + Of::stages);
  const int set = blockIdx.y, pass = threadIdx.x / 128, t = threadIdx.x % 4;
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;

  uint32_t unit = blockIdx.x * args.share, ahead = unit;
  const uint32_t end = min(unit + args.share, args.units);
  Walk walk(args, set * args.units + unit);
  bool fresh = true;
  const auto start_next = [&] {
    if (ahead < end) {
      const uint32_t i = ahead % Of::stages;
      uint4* stage = stages + i * 2 * Of::values;
      fetch<D, Coords>(args, walk, fresh, stage, positions + i * Of::positions * 4, tiles + i, stage + Of::values);
      fresh = walk.advance(args);
      ++ahead;
    }
  };
  start_next();
  const auto fill = [&](const auto* from) {
    from += set * args.basis_set;
    fill_basis<T, D, Interleaved, false>(from, basis);
    fill_basis<T, D, Interleaved, true>(from, transposed);
  };
  if (args.wide) {
    fill(static_cast<const float*>(args.basis));
  } else {
    fill(static_cast<const T*>(args.basis));
  }
  fill_frequencies<D>(args, set, frequencies);
  copies_end();
#pragma unroll
  for (int i = 2; i < Of::stages; ++i) {
    start_next();
    copies_end();
  }
  const Kept kept = Kept::of_pieces<D, Interleaved>();
  float c[2][8], s[2][8];
  float dbasis[D / 64][32] = {};  // rows [64 pass, 64 pass + 64), 64 columns each
  float dfreqs[Coords][8] = {};

  for (; unit < end; ++unit) {
    uint4* stage = stages + unit % Of::stages * 2 * Of::values;
    const uint4* x = stage + Of::values;
    const float* coordinates = positions + unit % Of::stages * Of::positions * 4;
    copies_wait<Of::stages - 2>();
    copies_visible();
    __syncthreads();  // this stage is there, and everyone has left the one before
    const Tile<T> now = tiles[unit % Of::stages];
    float sums[32], u[32];
    products_begin();
    if (args.dfreqs != nullptr) {
      multiply_basis<D, false, T>(u, x, basis);
    }
    products_end();
    if (now.fresh) {
      keep_phases<Coords>(args, frequencies, coordinates, kept, c, s);
    }
    turn_in_place<D, Interleaved>(stage, now, kept, c, s);
    products_wait(u);
    copies_visible();
    __syncthreads();
    products_begin();
    multiply_basis<D, true, T>(sums, stage, transposed);
    if (args.dbasis != nullptr) {
#pragma unroll
      for (int step = 0; step < tile / 16; ++step) {
#pragma unroll
        for (int n = 0; n < D / 64; ++n) {
          // Slabs of 64 values, 16 tokens further with each step. A token of the prefix has x = 0.
          multiply<T, Inner::both>(dbasis[n], operand(stage + pass * Of::slab + step * 128),
                                   operand(x + n * Of::slab + step * 128), true);
        }
      }
    }
    products_end();
    start_next();
    copies_end();
    if (args.dfreqs != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // z of this thread's planes: pieces of both coordinates, or of planes 4 and 4.
        const int first = Interleaved ? pass * 8 + t : pass * 4 + t, second = first + (Interleaved ? 4 : R / 8);
        float za[8], zb[8];
        widen<T, 8>(za, *reinterpret_cast<const Vec<T, 8>*>(stage + piece(row + i * 8, first)));
        widen<T, 8>(zb, *reinterpret_cast<const Vec<T, 8>*>(stage + piece(row + i * 8, second)));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float a = Interleaved ? (j < 4 ? za[2 * j] : zb[2 * j - 8]) : za[j];
          const float b = Interleaved ? (j < 4 ? za[2 * j + 1] : zb[2 * j - 7]) : zb[j];
          const float dphase = b * u[j * 4 + i * 2] - a * u[j * 4 + i * 2 + 1];
#pragma unroll
          for (int m = 0; m < Coords; ++m) {
            dfreqs[m][j] += dphase * coordinates[(row + i * 8) * Coords + m];
          }
        }
      }
    }
    products_wait(sums);
#pragma unroll
    for (int n = 0; n < D / 64; ++n) {
      products_wait(dbasis[n]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float a[8], b[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        a[j] = sums[j * 4 + i * 2];
        b[j] = sums[j * 4 + i * 2 + 1];
      }
      const int token = row + i * 8;
      if (now.from <= token && token < now.until) {
        store_row<D>(now.y + token * D, a, b);
      }
    }
    copy_prefix<D>(stage, now);
  }

  const int64_t slot = int64_t{set} * gridDim.x + blockIdx.x;
  if (args.dbasis != nullptr) {
    float* to = args.dbasis + slot * D * D + (pass * 64 + row) * D + 2 * t;
#pragma unroll
    for (int n = 0; n < D / 64; ++n) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        *reinterpret_cast<float2*>(to + n * 64 + j * 8) = {dbasis[n][j * 4], dbasis[n][j * 4 + 1]};
        *reinterpret_cast<float2*>(to + 8 * D + n * 64 + j * 8) = {dbasis[n][j * 4 + 2], dbasis[n][j * 4 + 3]};
      }
    }
  }
  if (args.dfreqs != nullptr) {
    store_frequency_gradient<D, Coords, Interleaved>(dfreqs, reinterpret_cast<float*>(stages), args.shape.C,
                                                     args.dfreqs + slot * args.shape.C * R);
  }
#endif
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> rotate_basis_bwd_cuda(const Tensor& dyq, const Tensor& dyk, const Tensor& q,
                                                                 const Tensor& k, const Tensor& positions,
                                                                 const Tensor& freqs, const Tensor& basis,
                                                                 bool interleaved, double factor, int64_t prefix,
                                                                 bool need_freqs, bool need_basis) {
  const char* op = "rotate_basis_bwd";
  check_gradients(op, dyq, dyk, q, k);
  const BasisProblem problem(op, q, k, positions, freqs, basis, prefix);
  const Shape& shape = problem.shape;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor dq = new_empty_like(q), dk = new_empty_like(k);
  const Tensor xq = with_aligned_rows(q), xk = with_aligned_rows(k);
  const Tensor upstream_q = with_aligned_rows(dyq), upstream_k = with_aligned_rows(dyk);
  const Tensor P = operand_of(basis, q.scalar_type(), true, false);
  const int64_t units = problem.tiles() / shape.sets, D = shape.D;
  const int64_t resident =
      attribute(q, cudaDevAttrMultiProcessorCount) * (D > 64 ? Layout<128, 1>::blocks : Layout<64, 1>::blocks);
  const int64_t share = ceil_div(units, std::clamp<int64_t>(resident / shape.sets, 1, std::max<int64_t>(units, 1)));
  const int64_t blocks = units > 0 ? ceil_div(units, share) : 0;
  // A gradient and the slots of its parts, (sets, blocks, ...), which are those of one set where all heads share it.
  const auto gradient = [&](const Tensor& of, bool needed, int sets, Tensor& parts, Tensor& sum) {
    const auto sizes = of.sizes();
    const int64_t n = needed ? of.numel() / sets : 0;
    parts = new_empty(q, {shape.sets, blocks, n}, ScalarType::Float);
    sum = needed ? new_empty(q, {sizes.begin(), sizes.end()}, ScalarType::Float) : new_empty(q, {0}, ScalarType::Float);
    return Slots<float>{static_cast<const float*>(parts.const_data_ptr()), static_cast<float*>(sum.mutable_data_ptr()),
                        sets, shape.sets / sets * blocks, n};
  };
  Tensor basis_parts, freq_parts, dbasis, dfreqs;
  const Slots<float> basis_slots = gradient(basis, need_basis, problem.basis_sets, basis_parts, dbasis);
  const Slots<float> freq_slots = gradient(freqs, need_freqs, problem.freq_sets, freq_parts, dfreqs);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    GradientArgs<T> args{};
    static_cast<BasisArgs<T>&>(args) =
        problem.args<T>(upstream_q, upstream_k, positions, freqs, P, factor, true, dq, dk);
    args.other_q = input<T>(xq);
    args.other_k = input<T>(xk);
    args.units = static_cast<uint32_t>(units);
    args.share = static_cast<uint32_t>(share);
    args.dbasis = need_basis ? static_cast<float*>(basis_parts.mutable_data_ptr()) : nullptr;
    args.dfreqs = need_freqs ? static_cast<float*>(freq_parts.mutable_data_ptr()) : nullptr;
    problem.dispatch(interleaved, [&](auto d, auto layout, auto coords) {
      constexpr int D = d, Coords = coords;
      constexpr bool Interleaved = layout;
      const auto kernel = rotate_basis_bwd_kernel<T, D, Interleaved, Coords>;
      using Of = Variant<D, Interleaved, Coords>;
      allow_memory<Of>(kernel, q.get_device_index());
      kernel<<<dim3(blocks, shape.sets), Of::threads, Of::bytes, current_stream(q)>>>(args);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  };
  if (blocks > 0) {
    q.scalar_type() == ScalarType::BFloat16 ? run(BFloat16{}) : run(Half{});
  }
  add_slots(basis_slots, freq_slots, current_stream(q));
  return {dq, dk, dbasis, dfreqs};
}

}  // namespace rotary
}  // namespace fastrpe
