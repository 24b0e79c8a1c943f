#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "rotary_basis.cuh"
#include "rotary_cuda.h"

// y = R(p) P x, or its adjoint P^T R(p)^T x, for 16-bit values, in one pass over memory, on Hopper's tensor cores.
//
// A block takes 128 tokens of two items (a sequence and head) that share basis and phases, as a rule the query and the
// key of a head. It asks for their rows and the basis at once and computes cosines and sines meanwhile. Blocks follow
// one another along the tokens, as memory likes it: one that took more tiles in turn would save the basis, which comes
// from the L2, and spread the traffic.
namespace fastrpe {
namespace rotary {
namespace {

// Shared memory of a block: the tiles of two items, the basis, the frequencies. All tiles have rows of D values, in
// slabs of 64 columns.
template <int D, int Coords>
struct Pair {
  static constexpr int tokens = 128, threads = 256;  // 64 tokens for each warpgroup
  static constexpr int blocks = D > 64 ? 2 : 3;      // of a multiprocessor
  static constexpr int tile = tokens * D / 8, basis = D * D / 8, frequencies = 2 * Coords * D / 2 / 4;
  static constexpr size_t bytes = 16 * (2 * tile + basis + frequencies);
};

// Tells kernels apart.
template <int D, bool Interleaved, bool Adjoint, int Coords>
struct Variant : Pair<D, Coords> {};

// Rows of one item, from a block's first token on.
template <typename T>
struct Item {
  const T* x;
  int64_t stride;
  T* y;
};

template <typename T>
__device__ __forceinline__ Item<T> item_at(const BasisArgs<T>& args, int64_t b, int set, int head, int first) {
  const Shape& shape = args.shape;
  const bool is_query = head < args.query_heads;
  const View<const T>& x = is_query ? args.q : args.k;
  const int h = is_query ? set * args.query_heads + head : set * args.key_heads + head - args.query_heads;
  T* y = (is_query ? args.yq : args.yk) + ((b * (is_query ? shape.H : shape.Hk) + h) * shape.L + first) * shape.D;
  return {x.at(b, h, first), x.stride.l, y};
}

// Starts to copy rows to shared memory, half of them by each warpgroup; those from `until` on become zero.
template <int D, int Rows, typename T>
__device__ __forceinline__ void fetch_rows(const T* from, int64_t stride, int until, uint4* to) {
  constexpr int per_row = D / 8, step = 128 / per_row;
  const int u = threadIdx.x % per_row, first = threadIdx.x / 128 * (Rows / 2) + threadIdx.x % 128 / per_row;
  const T* source = from + first * stride + u * 8;
  to += piece<Rows>(first, u);  // a step of 8 rows keeps the swizzle
#pragma unroll
  for (int n = 0; n < Rows / 2; n += step) {
    const bool inside = first + n < until;
    copy_async<16>(to + n * 8, inside ? source : from, inside);
    source += step * stride;
  }
}

// A thread's share of a basis of floats, on its way to where fetch_rows would copy one of T.
template <int D>
struct Share {
  static constexpr int per_row = D / 4, threads = 256, rows = threads / per_row;  // a step of so many keeps the swizzle
  float4 values[D / rows];

  // Where it stands: the compiler would move it to its use, behind other waits.
  __device__ __forceinline__ void load(const float* from) {
#pragma unroll
    for (int n = 0; n < D / rows; ++n) {
      float4& v = values[n];
      asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                   : "l"(from + (threadIdx.x + n * threads) * 4));
    }
  }

  template <typename T>
  __device__ __forceinline__ void round_to(uint4* to) const {
    const int row = threadIdx.x / per_row, u = threadIdx.x % per_row;
    Vec<T, 4>* at = reinterpret_cast<Vec<T, 4>*>(to + piece<D>(row, u / 2)) + u % 2;
#pragma unroll
    for (int n = 0; n < D / rows; ++n) {
      const float four[4] = {values[n].x, values[n].y, values[n].z, values[n].w};
      at[n * rows * 16] = narrow<T, 4>(four);
    }
  }
};

// Hides where a value comes from, so that what follows from it is computed for each item, not kept in registers.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A cosine and a sine in 16 bits each, so that a thread keeps 32 of them: the middle bytes of 1.25 + 0.625 c, which
// lies between 0.5 and 2; the error of 2.4e-5 is a tenth of float16's.
__device__ __forceinline__ uint32_t pack(float c, float s) {
  constexpr float half_a_step = 1.0f / 65536;
  const uint32_t x = __float_as_uint(fmaf(c, 0.625f, 1.25f + half_a_step));
  const uint32_t y = __float_as_uint(fmaf(s, 0.625f, 1.25f + half_a_step));
  return __byte_perm(x, y, 0x6521);
}

__device__ __forceinline__ void unpack(uint32_t packed, float factor, float& c, float& s) {
  constexpr uint32_t first_byte = 0x3f000000;
  packed = opaque(packed);
  c = fmaf(__uint_as_float(__byte_perm(packed, first_byte, 0x7104)), 1.6f * factor, -2.0f * factor);
  s = fmaf(__uint_as_float(__byte_perm(packed, first_byte, 0x7324)), 1.6f * factor, -2.0f * factor);
}

// The cosines and sines of a thread, by rows of the block's tile and planes of a row. Forward those of its part of the
// product: two rows, planes of columns 8 j + 2 t and the next. For the adjoint those of pieces u and u + D / 16 of
// 2048 / D rows, spread over the banks.
template <int D, bool Interleaved, bool Adjoint>
struct Phases {
  static constexpr int rows = Adjoint ? D / 32 : 2, planes = D / 4 / rows;
  uint32_t packed[rows][planes];
  uint32_t spoiled = 0;  // the rows that have a phase that is not finite, which `pack` cannot hold

  __device__ __forceinline__ static int row(int i) {
    const int warpgroup = threadIdx.x / 128 * 64;
    if constexpr (Adjoint) {
      const int k = threadIdx.x % 128 / (D / 16);
      return warpgroup + i * (2048 / D) + k / 8 * 8 + k % 2 * 4 + k % 8 / 2;
    } else {
      return warpgroup + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + i * 8;
    }
  }

  __device__ __forceinline__ static int plane(int n) {
    if constexpr (Adjoint) {
      const int u = threadIdx.x % (D / 16);
      return Interleaved ? u * 4 + n / 4 * (D / 4) + n % 4 : u * 8 + n;
    } else {
      const int t = threadIdx.x % 4;
      return Interleaved ? 4 * n + t : n / 2 * 8 + 2 * t + n % 2;
    }
  }

  // Positions of its rows, given those of the block's first token; zero where a row has none.
  template <int Coords>
  __device__ __forceinline__ static void load(float (&to)[rows][Coords], const float* positions, int C, int from,
                                              int until) {
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const bool inside = from <= row(i) && row(i) < until;
#pragma unroll
      for (int m = 0; m < Coords; ++m) {
        to[i][m] = inside && m < C ? positions[row(i) * C + m] : 0.0f;
      }
    }
  }

  template <int Coords, typename T>
  __device__ __forceinline__ void compute(const BasisArgs<T>& args, const float* frequencies,
                                          const float (&position)[rows][Coords]) {
    const float* rest = frequencies + args.shape.C * args.shape.R;
    float sums[rows] = {};
#pragma unroll
    for (int n = 0; n < planes; ++n) {
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        float c, s;
        phases<Coords, T, 1>(args, frequencies, rest, position[i], plane(n), 1.0f, 1.0f, &c, &s);
        packed[i][n] = pack(c, s);
        sums[i] += c;
      }
    }
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      spoiled |= isnan(sums[i]) ? 1u << i : 0u;
    }
  }

  // Row i's, NaN where it is spoiled.
  __device__ __forceinline__ float factor(int i, float given) const {
    return spoiled >> i & 1 ? NAN : given;
  }
};

// The product's registers of a thread by columns: 4 j + 2 i + e is of row i, column 8 j + 2 t + e.
template <int D>
using Sums = float[D / 64][32];

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A warpgroup's 64 rows of a tile times the basis, whose rows, as they lie, are of the inner index for the adjoint.
template <int D, bool Adjoint, typename T>
__device__ __forceinline__ void multiply_rows(Sums<D>& sums, const uint4* tile, const uint4* basis) {
  // An operand counts in 16 bytes, too.
  const uint64_t left = operand(tile + threadIdx.x / 128 * 64 * 8), right = operand(basis);
  products_begin();
#pragma unroll
  for (int n = 0; n < D / 64; ++n) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const int column = step % 4 * 2, rows = Adjoint ? n * D * 8 + step * 16 * 8 : step / 4 * D * 8 + n * 64 * 8;
      multiply<T, Adjoint ? Inner::b : Inner::none>(sums[n], left + step / 4 * 128 * 8 + column,
                                                    right + rows + (Adjoint ? 0 : column), step > 0);
    }
  }
  products_end();
  for (auto& part : sums) {
    products_wait(part);
  }
}

template <int D, bool Interleaved>
__device__ __forceinline__ void turn_sums(Sums<D>& sums, const Phases<D, Interleaved, false>& phases, float factor) {
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int a = Interleaved ? n * 4 + i * 2 : n / 2 * 4 + i * 2 + n % 2, b = Interleaved ? a + 1 : a + D / 4;
      float c, s;
      unpack(phases.packed[i][n], phases.factor(i, factor), c, s);
      turn(sums[a / 32][a % 32], sums[b / 32][b % 32], c, s);
    }
  }
}

// R(p)^T of a warpgroup's rows, where they lie.
template <int D, bool Interleaved, typename T>
__device__ __forceinline__ void turn_back(uint4* tile, const Phases<D, Interleaved, true>& phases, float factor) {
  const int u = threadIdx.x % (D / 16), row = phases.row(0);
  const int x = opaque(piece<128>(row, u)), z = opaque(piece<128>(row, u + D / 16));
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    float c[8], s[8];
    const float row_factor = phases.factor(i, factor);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      unpack(phases.packed[i][j], row_factor, c[j], s[j]);
      s[j] = -s[j];
    }
    const int further = (phases.row(i) - row) * 8;
    turn_pieces<Interleaved, T>(*reinterpret_cast<Vec<T, 8>*>(tile + x + further),
                                *reinterpret_cast<Vec<T, 8>*>(tile + z + further), c, s);
  }
}

// Writes a warp's 16 rows of the product over those of the tile.
template <int D, typename T>
__device__ __forceinline__ void write_rows(const Sums<D>& sums, uint4* tile) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
  const uint32_t address = shared_address(tile + piece<128>(row, lane / 16 * (D / 16)));
#pragma unroll
  for (int j = 0; j < D / 16; ++j) {
    uint32_t v[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int at = (j + n / 2 * (D / 16)) * 4 + n % 2 * 2;
      const float pair[2] = {sums[at / 32][at % 32], sums[at / 32][at % 32 + 1]};
      v[n] = narrow<T, 2>(pair).at[0];
    }
    store_matrices(address ^ j * 16, v);  // piece j further
  }
}
#endif

// Stores a warp's 16 rows, those in [from, until).
template <int D, typename T>
__device__ __forceinline__ void store_rows(const uint4* tile, T* y, int from, int until) {
  constexpr int per_row = D / 8, at_once = 4;
  const int lane = opaque(threadIdx.x % 32);
  const int u = lane % per_row, first = threadIdx.x / 32 * 16 + lane / per_row;
#pragma unroll
  for (int n = 0; n < 16; n += at_once * 32 / per_row) {
    uint4 v[at_once];
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      v[i] = tile[piece<128>(first + n + i * (32 / per_row), u)];
    }
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int row = first + n + i * (32 / per_row);
      if (from <= row && row < until) {
        *reinterpret_cast<uint4*>(y + row * D + u * 8) = v[i];
      }
    }
  }
}

template <typename T, int D, bool Interleaved, bool Adjoint, int Coords>
__global__ void __launch_bounds__(Pair<D, Coords>::threads, Pair<D, Coords>::blocks)
    rotate_basis_kernel(const BasisArgs<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Pair<D, Coords>;
  extern __shared__ __align__(1024) char memory[];
  uint4* tiles = reinterpret_cast<uint4*>(memory);
  uint4* basis = tiles + 2 * Of::tile;
  float* frequencies = reinterpret_cast<float*>(basis + Of::basis);

  const Shape& shape = args.shape;
  const int set = blockIdx.y, head = blockIdx.z * 2, items = min(2, args.query_heads + args.key_heads - head);
  const int64_t b = blockIdx.x / static_cast<uint32_t>(args.row_tiles);
  const int first = blockIdx.x % static_cast<uint32_t>(args.row_tiles) * Of::tokens;
  const int until = min(static_cast<int64_t>(Of::tokens), shape.L - first);
  const int from = max(int64_t{0}, shape.prefix - first);

  const auto fetch_item = [&](int i) {
    const Item<T> item = item_at(args, b, set, head + i, first);
    fetch_rows<D, Of::tokens>(item.x, item.stride, until, tiles + i * Of::tile);
  };
  fetch_item(0);
  if (!args.wide) {
    fetch_rows<D, D>(static_cast<const T*>(args.basis) + set * args.basis_set, D, D, basis);
  }
  copies_end();
  if (items > 1) {
    fetch_item(1);
  }
  copies_end();
  Phases<D, Interleaved, Adjoint> phases;
  float position[phases.rows][Coords];
  const int64_t token = (shape.batch_positions ? b : 0) * shape.tokens() + first - shape.prefix;
  phases.load(position, args.positions + token * shape.C, shape.C, from, until);
  Share<D> share;
  if (args.wide) {
    share.load(static_cast<const float*>(args.basis) + set * args.basis_set);
  }
  fill_frequencies<D>(args, set, frequencies);
  if (args.wide) {
    share.template round_to<T>(basis);
  }
  __syncthreads();
  phases.compute(args, frequencies, position);

  int i = 0;
#pragma unroll 1
  do {
    uint4* tile = tiles + i * Of::tile;
    if (i + 1 < items) {
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    copies_visible();
    if (i == 0) {
      __syncthreads();  // the basis is everyone's, a tile's rows a warpgroup's own
    } else {
      warpgroup_sync();
    }
    if constexpr (Adjoint) {
      turn_back<D, Interleaved, T>(tile, phases, args.factor);
      copies_visible();
      warpgroup_sync();
    }
    Sums<D> sums;
    if (args.columns) {
      multiply_rows<D, !Adjoint, T>(sums, tile, basis);
    } else {
      multiply_rows<D, Adjoint, T>(sums, tile, basis);
    }
    warpgroup_sync();  // every warp has read this tile
    if constexpr (!Adjoint) {
      turn_sums<D>(sums, phases, args.factor);
    }
    write_rows<D, T>(sums, tile);
    __syncwarp();
    const Item<T> item = item_at(args, b, set, head + i, first);
    store_rows<D>(tile, item.y, from, until);
#pragma unroll 1
    for (int n = threadIdx.x; n < min(from, until) * (D / 8); n += Of::threads) {
      const int u = n % (D / 8), row = n / (D / 8);
      *reinterpret_cast<uint4*>(item.y + row * D + u * 8) =
          *reinterpret_cast<const uint4*>(item.x + row * item.stride + u * 8);
    }
  } while (++i < items);
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
  // Every block can read the basis in float32 and round it, which saves a launch. With 128 coordinates, twice the bytes
  // cost more than the launch where blocks are more than run at once.
  const Shape& shape = problem.shape;
  const int64_t count = int64_t{ceil_div(shape.L, 128)} * shape.B * shape.sets * ceil_div(shape.heads(), 2);
  const bool rounds = shape.D == 64 || count <= Pair<128, 1>::blocks * attribute(q, cudaDevAttrMultiProcessorCount);
  const Tensor xq = with_aligned_rows(q), xk = with_aligned_rows(k);
  const Tensor P = operand_of(basis, q.scalar_type(), rounds, true);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    BasisArgs<T> args = problem.args<T>(xq, xk, positions, freqs, P, factor, inverse, yq, yk);
    problem.dispatch(interleaved, [&](auto d, auto layout, auto coords) {
      constexpr int D = d, Coords = coords;
      constexpr bool Interleaved = layout;
      const auto launch = [&](auto adjoint) {
        constexpr bool Adjoint = adjoint;
        using Of = Variant<D, Interleaved, Adjoint, Coords>;
        const auto kernel = rotate_basis_kernel<T, D, Interleaved, Adjoint, Coords>;
        args.row_tiles = ceil_div(args.shape.L, Of::tokens);
        const dim3 blocks(args.row_tiles * args.shape.B, args.shape.sets, ceil_div(args.shape.heads(), 2));
        allow_memory<Of>(kernel, q.get_device_index());
        kernel<<<blocks, Of::threads, Of::bytes, current_stream(q)>>>(args);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      };
      inverse ? launch(std::true_type{}) : launch(std::false_type{});
    });
  };
  q.scalar_type() == ScalarType::BFloat16 ? run(BFloat16{}) : run(Half{});
  return {yq, yk};
}

}  // namespace rotary
}  // namespace fastrpe
