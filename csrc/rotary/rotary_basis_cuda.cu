#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../common/cuda.cuh"
#include "rotary_args.h"
#include "rotary_cuda.h"
#include "rotary_phase.cuh"

// y = R(p) P x, or its adjoint P^T R(p)^T x, for 16-bit values, in one pass over memory.
//
// A block stays on its multiprocessor with one basis in shared memory, laid out as the tensor cores read it. Each warp
// walks through tiles of 8 tokens times 2 of two items (a query head and its key head, say): the next tile is copied to
// shared memory while this one is multiplied, turned and stored. A product minds neither the order of its inner index
// nor that of its rows, so both are dealt such that a thread reads 16 neighbouring values, finds both coordinates of a
// plane in its own registers, and stores 4 neighbouring planes (8 neighbouring values in the adjoint).
namespace fastrpe {
namespace rotary {
namespace {

constexpr int tile = 16;  // tokens
constexpr int pair = 2;   // items of a tile

// Shared memory: the basis, two stages for each warp, frequencies in turns. As many warps as fit into Hopper's 227 KiB.
template <int D, int Coords>
struct Memory {
  static constexpr int warps = D > 64 && Coords > 1 ? 11 : 12;
  static constexpr int basis = D * D / 8;                   // in 16 bytes
  static constexpr int values = pair * tile * D / 8;        // of a stage
  static constexpr int stage = values + tile * Coords / 4;  // and coordinates
  static constexpr size_t bytes = 16 * (basis + warps * 2 * stage) + 2 * sizeof(float) * Coords * D / 2;
};

template <typename T>
struct BasisArgs {
  Shape shape;
  View<const T> q, k;
  View<T> yq, yk;
  const float* positions;
  const float* freqs;
  const T* basis;  // (D, D) or (sets, D, D)
  int64_t basis_set;
  int64_t freq_set;  // strides of a set, 0 where shared
  float factor, sign;
  uint32_t row_tiles, pairs, units;  // of a sequence, of a set's items, and their product over all sequences
};

// c += a b for a 16 x 16 piece of the basis and 16 x 8 values.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
}

// Copies N bytes to shared memory in the background, or zeros.
template <int N>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (N == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(inside ? 4 : 0));
  }
}

// Coordinate `second` of plane r.
template <int D, bool Interleaved>
__device__ __forceinline__ int coordinate(int r, int second) {
  return Interleaved ? 2 * r + second : r + second * (D / 2);
}

// The basis as (passes x 4 tiles of 16 rows, D / 16 steps of the inner index, 32 lanes, 4 words of 2 values).
template <typename T, int D, bool Interleaved, bool Adjoint>
__device__ __forceinline__ void fill_basis(const T* basis, uint32_t* words) {
#pragma unroll 4
  for (int i = threadIdx.x; i < D * D / 2; i += blockDim.x) {
    const int w = i % 4, t = i / 4 % 4, g = i / 16 % 8, step = i / 128 % (D / 16), j = i / 128 / (D / 16);
    const int inner = step / 2 * 32 + t * 8 + step % 2 * 4 + w / 2 * 2;  // the first of two neighbours
    T v[2];
    if constexpr (Adjoint) {
      const int column = j / 4 * 64 + g * 8 + j % 4 * 2 + w % 2;
      for (int n = 0; n < 2; ++n) {
        v[n] = basis[coordinate<D, Interleaved>((inner + n) % (D / 2), (inner + n) / (D / 2)) * D + column];
      }
    } else {
      const int row = coordinate<D, Interleaved>(j / 4 * 32 + g * 4 + j % 4, w % 2);
      v[0] = basis[row * D + inner];
      v[1] = basis[row * D + inner + 1];
    }
    words[i] = *reinterpret_cast<const uint16_t*>(&v[0]) |
               static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&v[1])) << 16;
  }
}

// What a warp works on: 16 tokens of one or two items. Decoded once, since its divisions cost as much as the products.
template <typename T>
struct Place {
  const T* in[pair];     // token 0 of the tile
  int64_t stride[pair];  // of its tokens
  int out[pair];         // row of the output, complemented for k: a pointer would take another register
  const float* position;
  int first, tokens;  // index of token 0, how many there are
  bool two;           // items

  Place() = default;
  __device__ __forceinline__ Place(const BasisArgs<T>& args, int set, uint32_t unit) {
    const Shape& shape = args.shape;
    const uint32_t i_row = unit / args.pairs, i_pair = unit - i_row * args.pairs;
    const uint32_t sequence = i_row / args.row_tiles;
    const int heads = shape.heads(), nq = shape.query_heads(), nk = heads - nq;
    first = (i_row - sequence * args.row_tiles) * tile;
    tokens = min(static_cast<int64_t>(tile), shape.L - first);
    two = (i_pair + 1) * pair <= static_cast<uint32_t>(shape.items());
    position = args.positions + (sequence * shape.tokens() + first - shape.prefix) * shape.C;
#pragma unroll
    for (int e = 0; e < pair; ++e) {
      const uint32_t item = i_pair * pair + (two ? e : 0), i_b = item / heads;
      const int j = item - i_b * heads;
      const int64_t b = shape.batch_positions ? sequence : i_b;
      const bool is_query = j < nq;
      const int64_t h = is_query ? set * nq + j : set * nk + j - nq;
      in[e] = is_query ? args.q.at(b, h, first) : args.k.at(b, h, first);
      const int row = (b * (is_query ? shape.H : shape.Hk) + h) * shape.L + first;
      out[e] = is_query ? row : ~row;
      stride[e] = is_query ? args.q.stride.l : args.k.stride.l;
    }
  }

  template <int D>
  __device__ __forceinline__ T* output(const BasisArgs<T>& args, int e, int i) const {
    return out[e] < 0 ? args.yk.data + static_cast<int64_t>(~out[e] + i) * D
                      : args.yq.data + static_cast<int64_t>(out[e] + i) * D;
  }

  __device__ __forceinline__ bool has(int e, int i) const {
    return i < tokens && (e == 0 || two);
  }
};

// Of a tile in shared memory, (pair, tile, D): the 16 bytes number u of a token. Swizzled, so that neighbouring tokens
// lie on different banks.
template <int D>
__device__ __forceinline__ int piece(int e, int i, int u) {
  return (e * tile + i) * (D / 8) + (u ^ (i % 2 * 4));
}

template <int D, int Coords, typename T>
__device__ __forceinline__ void fetch(const BasisArgs<T>& args, const Place<T>& place, uint4* stage, int lane) {
  constexpr int per_row = D / 8, at_a_time = 32 / per_row;  // rows
  const int u = lane % per_row, i = lane / per_row;
#pragma unroll
  for (int e = 0; e < pair; ++e) {
    const T* from = place.in[e] + i * place.stride[e] + u * 8;
    uint4* to = stage + piece<D>(e, i, u);
#pragma unroll
    for (int n = 0; n < tile; n += at_a_time) {
      const bool inside = n + i < place.tokens;
      copy_async<16>(to + n * per_row, inside ? from : place.in[e], inside);
      from += at_a_time * place.stride[e];
    }
  }
  // Coordinates of the tokens, (tile, Coords), behind the values; zero for those of the prefix.
  float* positions = reinterpret_cast<float*>(stage + Memory<D, Coords>::values);
#pragma unroll
  for (int n = lane; n < tile * Coords; n += 32) {
    const int i = n / Coords, m = n % Coords, C = args.shape.C;
    const bool inside = i < place.tokens && place.first + i >= args.shape.prefix && m < C;
    copy_async<4>(positions + n, inside ? place.position + i * C + m : args.positions, inside);
  }
}

// cos and sin of planes [r, r + N) at a position.
template <int Coords, typename T, int N>
__device__ __forceinline__ void phases(const BasisArgs<T>& args, const float* hi, const float* lo,
                                       const float* position, int r, float (&c)[N], float (&s)[N]) {
  Phase<float> phase[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    phase[j] = product(position[0], Turns<float>{hi[r + j], lo[r + j]});
  }
#pragma unroll
  for (int m = 1; m < Coords; ++m) {
    if (Coords == 2 || m < args.shape.C) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        accumulate<T>(phase[j],
                      product(position[m], Turns<float>{hi[m * args.shape.R + r + j], lo[m * args.shape.R + r + j]}));
      }
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    phase_cos_sin<T>(phase[j], c[j], s[j]);
    c[j] *= args.factor;
    s[j] *= args.factor * args.sign;
  }
}

// Nothing here reads what it stores, so loads may be moved past these.
template <typename T, int N>
__device__ __forceinline__ void store_global(T* p, const Vec<T, N>& v) {
  if constexpr (N == 8) {
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.at[0]), "r"(v.at[1]),
                 "r"(v.at[2]), "r"(v.at[3]));
  } else {
    asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.at[0]), "r"(v.at[1]));
  }
}

template <typename T, int D, bool Interleaved, bool Adjoint, int Coords>
__global__ void __launch_bounds__(Memory<D, Coords>::warps * 32, 1) rotate_basis_kernel(const BasisArgs<T> args) {
  using Of = Memory<D, Coords>;
  constexpr int R = D / 2, steps = D / 16, warps = Of::warps;
  extern __shared__ __align__(16) char memory[];
  const Shape& shape = args.shape;
  const int set = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  uint4* basis = reinterpret_cast<uint4*>(memory);
  uint4* stages = basis + Of::basis + warp * 2 * Of::stage;
  float* hi = reinterpret_cast<float*>(basis + Of::basis + warps * 2 * Of::stage);  // (C, R): frequencies in turns
  float* lo = hi + shape.C * R;

  // A warp's units lie side by side: those of one tile of tokens share its phases.
  const uint32_t share = (args.units + gridDim.x * warps - 1) / (gridDim.x * warps);
  uint32_t unit = (blockIdx.x * warps + warp) * share;
  const uint32_t end = min(unit + share, args.units);
  // This thread's tokens: the rows of its products, or in the adjoint of its operands.
  const auto token_at = [&](int n) { return Adjoint ? n * 8 + g : n / 2 * 8 + 2 * t + n % 2; };
  // Where they fit into registers, cos and sin are kept while only the items change.
  constexpr bool keeps = D == 64;
  constexpr int kept = keeps ? 16 : 1;
  float kept_c[kept], kept_s[kept];
  const float* kept_position = nullptr;
  Place<T> place, next;
  const auto start = [&](uint32_t i_unit, uint4* stage) {
    next = Place<T>(args, set, i_unit);
    fetch<D, Coords>(args, next, stage, lane);
  };
  if (unit < end) {
    start(unit, stages);
  }
  asm volatile("cp.async.commit_group;");
  fill_basis<T, D, Interleaved, Adjoint>(args.basis + set * args.basis_set, reinterpret_cast<uint32_t*>(basis));
  for (int i = threadIdx.x; i < shape.C * R; i += warps * 32) {
    const Turns<float> w = turns(args.freqs[set * args.freq_set + i]);
    hi[i] = w.hi;
    lo[i] = w.lo;
  }
  __syncthreads();

  for (int now = 0; unit < end; ++unit, now ^= 1) {
    const uint4* stage = stages + now * Of::stage;
    const float* positions = reinterpret_cast<const float*>(stage + Of::values);
    place = next;
    if (unit + 1 < end) {
      start(unit + 1, stages + (now ^ 1) * Of::stage);
    }
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
    const bool known = keeps && place.position == kept_position;
    const auto phase_of = [&](int n, int r, auto& c, auto& s) {
      [[maybe_unused]] constexpr int count = Adjoint ? 8 : 4;
      if (!known) {
        phases<Coords, T>(args, hi, lo, positions + token_at(n) * Coords, r, c, s);
      }
      if constexpr (keeps) {  // all planes in one pass
#pragma unroll
        for (int j = 0; j < count; ++j) {
          if (known) {
            c[j] = kept_c[n * count + j];
            s[j] = kept_s[n * count + j];
          } else {
            kept_c[n * count + j] = c[j];
            kept_s[n * count + j] = s[j];
          }
        }
      }
    };
    if constexpr (!Adjoint) {
#pragma unroll
      for (int pass = 0; pass < R / 32; ++pass) {
        float sums[pair * 2][4][4] = {};  // of (item, half a tile), planes, (first or second coordinate, token)
#pragma unroll
        for (int chunk = 0; chunk < D / 32; ++chunk) {
          uint4 x[pair * 2];
#pragma unroll
          for (int n = 0; n < pair * 2; ++n) {
            x[n] = stage[piece<D>(n / 2, n % 2 * 8 + g, chunk * 4 + t)];
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint4* m = basis + ((pass * 4 + j) * steps + chunk * 2) * 32 + lane;
            const uint4 m0 = m[0], m1 = m[32];
#pragma unroll
            for (int n = 0; n < pair * 2; ++n) {
              multiply_add<T>(sums[n][j], m0, x[n].x, x[n].y);
              multiply_add<T>(sums[n][j], m1, x[n].z, x[n].w);
            }
          }
        }
        const int r = pass * 32 + g * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // this thread's tokens: 2 t and 2 t + 1 of both halves
          const int token = token_at(i);
          float c[4], s[4];
          phase_of(i, r, c, s);
#pragma unroll
          for (int e = 0; e < pair; ++e) {
            float a[4], b[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              a[j] = sums[e * 2 + i / 2][j][i % 2];
              b[j] = sums[e * 2 + i / 2][j][2 + i % 2];
              turn(a[j], b[j], c[j], s[j]);
            }
            if (place.has(e, token) && place.first + token >= shape.prefix) {
              T* y = place.template output<D>(args, e, token);
              if constexpr (Interleaved) {
                const float both[8] = {a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};
                store_global<T, 8>(y + 2 * r, narrow<T, 8>(both));
              } else {
                store_global<T, 4>(y + r, narrow<T, 4>(a));
                store_global<T, 4>(y + R + r, narrow<T, 4>(b));
              }
            }
          }
        }
      }
    } else {
      uint4 x[pair * 2][D / 32];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = half * 8 + g;
#pragma unroll
        for (int group = 0; group < R / 32; ++group) {
          float c[8], s[8];
          phase_of(half, group * 32 + t * 8, c, s);
#pragma unroll
          for (int e = 0; e < pair; ++e) {
            float a[8], b[8];
            if constexpr (Interleaved) {
              float both[2][8];
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                const uint4 v = stage[piece<D>(e, i, group * 8 + 2 * t + n)];
                widen<T, 8>(both[n], *reinterpret_cast<const Vec<T, 8>*>(&v));
              }
#pragma unroll
              for (int j = 0; j < 8; ++j) {
                a[j] = both[j / 4][2 * j % 8];
                b[j] = both[j / 4][2 * j % 8 + 1];
              }
            } else {
              const uint4 va = stage[piece<D>(e, i, group * 4 + t)], vb = stage[piece<D>(e, i, R / 8 + group * 4 + t)];
              widen<T, 8>(a, *reinterpret_cast<const Vec<T, 8>*>(&va));
              widen<T, 8>(b, *reinterpret_cast<const Vec<T, 8>*>(&vb));
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              turn(a[j], b[j], c[j], s[j]);
            }
            const Vec<T, 8> first = narrow<T, 8>(a), second = narrow<T, 8>(b);
            x[e * 2 + half][group] = *reinterpret_cast<const uint4*>(&first);
            x[e * 2 + half][R / 32 + group] = *reinterpret_cast<const uint4*>(&second);
          }
        }
      }
#pragma unroll
      for (int pass = 0; pass < D / 64; ++pass) {
        float sums[pair * 2][4][4] = {};
#pragma unroll
        for (int chunk = 0; chunk < D / 32; ++chunk) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint4* m = basis + ((pass * 4 + j) * steps + chunk * 2) * 32 + lane;
            const uint4 m0 = m[0], m1 = m[32];
#pragma unroll
            for (int n = 0; n < pair * 2; ++n) {
              multiply_add<T>(sums[n][j], m0, x[n][chunk].x, x[n][chunk].y);
              multiply_add<T>(sums[n][j], m1, x[n][chunk].z, x[n][chunk].w);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = i / 2 * 8 + 2 * t + i % 2;
#pragma unroll
          for (int e = 0; e < pair; ++e) {
            float y[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              y[j] = sums[e * 2 + i / 2][j / 2][j % 2 * 2 + i % 2];
            }
            if (place.has(e, token) && place.first + token >= shape.prefix) {
              store_global<T, 8>(place.template output<D>(args, e, token) + pass * 64 + g * 8, narrow<T, 8>(y));
            }
          }
        }
      }
    }
    // Tokens of the prefix are copied bit for bit; few tiles have any.
    if (place.first < shape.prefix) {
#pragma unroll
      for (int e = 0; e < pair; ++e) {
        for (int n = lane; n < tile * D / 8; n += 32) {
          const int u = n % (D / 8), i = n / (D / 8);
          if (place.has(e, i) && place.first + i < shape.prefix) {
            *reinterpret_cast<uint4*>(place.template output<D>(args, e, i) + u * 8) = stage[piece<D>(e, i, u)];
          }
        }
      }
    }
    kept_position = place.position;
    __syncwarp();  // before the next copy overwrites this stage
  }
}

template <typename T>
bool aligned(const View<const T>& x) {
  const Strides& stride = x.stride;
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && stride.d == 1 && stride.b % 8 == 0 && stride.h % 8 == 0 &&
         stride.l % 8 == 0;
}

int multiprocessors(const Tensor& x) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  return count;
}

}  // namespace

std::tuple<Tensor, Tensor> rotate_basis_cuda(const Tensor& q, const Tensor& k, const Tensor& positions,
                                             const Tensor& freqs, const Tensor& basis, bool interleaved, bool inverse,
                                             double factor, int64_t prefix) {
  const char* op = "rotate_basis";
  Shape shape = shape_of(op, q, k, positions, freqs, prefix, false);
  check_like(op, "basis", basis, q.scalar_type(), q);
  const int64_t n = basis.dim();
  STD_TORCH_CHECK(basis.is_contiguous(), op, ": basis must be contiguous");
  STD_TORCH_CHECK(
      (n == 2 || n == 3) && basis.size(n - 1) == shape.D && basis.size(n - 2) == shape.D && 2 * shape.R == shape.D, op,
      ": basis must have shape (D, D) or (H, D, D), and freqs D // 2 planes");
  const int freq_sets = shape.sets, basis_sets = n == 3 ? static_cast<int>(basis.size(0)) : 1;
  STD_TORCH_CHECK(freq_sets == 1 || basis_sets == 1 || freq_sets == basis_sets, op,
                  ": basis and freqs must have the same number of heads");
  // A block holds one basis in shared memory: a set is what shares frequencies and basis.
  shape.sets = std::max(freq_sets, basis_sets);
  STD_TORCH_CHECK(shape.H % shape.sets == 0 && shape.Hk % shape.sets == 0, op,
                  ": the heads of q and k must be multiples of those of basis");
  check_limits(op, shape);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor yq = new_empty_like(q), yk = new_empty_like(k);
  if (shape.rows() * shape.items() == 0) {
    return {yq, yk};
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    BasisArgs<T> args{};
    args.shape = shape;
    args.q = input<T>(q);
    args.k = input<T>(k);
    STD_TORCH_CHECK(aligned(args.q) && aligned(args.k), op, ": rows of q and k must be aligned to 16 bytes");
    args.yq = output<T>(yq);
    args.yk = output<T>(yk);
    args.positions = static_cast<const float*>(positions.const_data_ptr());
    args.freqs = static_cast<const float*>(freqs.const_data_ptr());
    args.basis = static_cast<const T*>(basis.const_data_ptr());
    args.basis_set = basis_sets > 1 ? static_cast<int64_t>(shape.D) * shape.D : 0;
    args.freq_set = freq_sets > 1 ? static_cast<int64_t>(shape.C) * shape.R : 0;
    args.factor = static_cast<float>(factor);
    args.sign = inverse ? -1.0f : 1.0f;
    args.row_tiles = ceil_div(shape.L, tile);
    args.pairs = ceil_div(shape.items(), pair);
    const int64_t total = args.row_tiles * (shape.rows() / shape.L) * args.pairs;
    STD_TORCH_CHECK(total < (int64_t{1} << 31) && shape.B * std::max(shape.H, shape.Hk) * shape.L < (int64_t{1} << 31),
                    op, ": q and k are too large for one launch; rotate them in parts");
    args.units = static_cast<uint32_t>(total);
    const auto launch = [&](auto d, auto layout, auto adjoint, auto coords) {
      constexpr int D = d, Coords = coords;
      constexpr bool Interleaved = layout, Adjoint = adjoint;
      using Of = Memory<D, Coords>;
      // One block for each multiprocessor, or a few fewer where the sets do not divide them.
      const dim3 grid(std::clamp<int64_t>(multiprocessors(q) / shape.sets, 1, ceil_div(total, Of::warps)), shape.sets);
      const auto kernel = rotate_basis_kernel<T, D, Interleaved, Adjoint, Coords>;
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Of::bytes));
      kernel<<<grid, Of::warps * 32, Of::bytes, current_stream(q)>>>(args);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    const auto with_layout = [&](auto d, auto coords) {
      using yes = std::true_type;
      using no = std::false_type;
      if (interleaved) {
        inverse ? launch(d, yes{}, yes{}, coords) : launch(d, yes{}, no{}, coords);
      } else {
        inverse ? launch(d, no{}, yes{}, coords) : launch(d, no{}, no{}, coords);
      }
    };
    using std::integral_constant;
    const auto with_coords = [&](auto d) {
      if (shape.C == 1) {
        with_layout(d, integral_constant<int, 1>{});
      } else if (shape.C == 2) {
        with_layout(d, integral_constant<int, 2>{});
      } else {
        with_layout(d, integral_constant<int, max_coords>{});
      }
    };
    STD_TORCH_CHECK(shape.D == 64 || shape.D == 128, op, ": D must be 64 or 128");
    if (shape.D == 64) {
      with_coords(integral_constant<int, 64>{});
    } else {
      with_coords(integral_constant<int, 128>{});
    }
  };
  if (q.scalar_type() == ScalarType::BFloat16) {
    run(BFloat16{});
  } else {
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half, op, ": q must have dtype float16 or bfloat16");
    run(Half{});
  }
  return {yq, yk};
}

}  // namespace rotary
}  // namespace fastrpe
