// What the kernels that apply an orthogonal basis share: the order of work, copies to shared memory, phases.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../common/cuda.cuh"
#include "../common/hopper.cuh"
#include "rotary_args.h"
#include "rotary_phase.cuh"

namespace fastrpe {
namespace rotary {

constexpr int tile = 64;  // tokens

template <typename T>
struct BasisArgs {
  Shape shape;
  View<const T> q, k;              // what is rotated: for gradients those of the results
  View<const T> other_q, other_k;  // for gradients, what was rotated
  T *yq, *yk;                      // contiguous
  const float* positions;
  const float* freqs;
  const void* basis;  // (D, D) or (sets, D, D), of T or float
  bool wide;          // of float
  bool columns;       // its columns are contiguous, not its rows
  int64_t basis_set;
  int64_t freq_set;  // strides of a set, 0 where shared
  float factor, sign;
  int query_heads, key_heads;         // of a set
  int row_tiles, sequences, batches;  // tiles of a sequence; of (sequences, batches) one is B, the other 1
  uint32_t units, share;              // tiles of all items (of a set's, for gradients); how many a block takes
};

// Shared memory in units of 16 bytes, every tile of 64 rows x 64 values swizzled over its 128-byte rows.
template <int D, int Coords>
struct Memory {
  static constexpr int threads = 2 * D;  // a warpgroup for each 64 columns of the product
  static constexpr int slab = 64 * 64 / 8;
  static constexpr int slabs = D / 64;  // of a row
  static constexpr int basis = slabs * slabs * slab;
  static constexpr int values = slabs * slab;  // of a stage
  static constexpr int positions = tile * Coords / 4;
  static constexpr int frequencies = 2 * Coords * D / 2 / 4;
  static constexpr int tile_info = 2;
};

// Where the 16 bytes number u of a row lie, of a tile of so many rows, as the tensor cores read them.
template <int Rows = tile>
__device__ __forceinline__ int piece(int row, int u) {
  return u / 8 * (Rows * 8) + row % Rows * 8 + (u % 8 ^ row % 8);
}

// Coordinate `second` of plane r.
template <int D, bool Interleaved>
__device__ __forceinline__ int coordinate(int r, int second) {
  return Interleaved ? 2 * r + second : r + second * (D / 2);
}

// The product's columns, dealt such that a thread, which holds columns 8 j + 2 t and the next of every j < 8, finds
// both coordinates of its planes and 8 neighbouring values.
template <bool Interleaved>
__device__ __forceinline__ int plane_of(int column) {
  const int pass = column / 64, j = column % 64 / 8, t = column % 8 / 2;
  return pass * 32 + (Interleaved ? j / 4 * 16 + t * 4 + j % 4 : t * 8 + j);
}

// Copies N values of a basis, as many as an asynchronous copy takes, or rounds them.
template <typename T, int N>
__device__ __forceinline__ void copy_values(const T* from, void* to) {
  copy_async<sizeof(T) * N>(to, from, true);
}

template <typename T, int N>
__device__ __forceinline__ void copy_values(const float* from, void* to) {
  float values[N];
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    const float2 pair = *reinterpret_cast<const float2*>(from + j);
    values[j] = pair.x;
    values[j + 1] = pair.y;
  }
  *static_cast<Vec<T, N>*>(to) = narrow<T, N>(values);
}

// The right operand of the product. Forward, row n of pass p is column 64 p + n of the product: a row of the basis. For
// the adjoint its rows are the basis's own, and the columns are dealt two at a time.
template <typename T, int D, bool Interleaved, bool Adjoint, typename From>
__device__ __forceinline__ void fill_basis(const From* basis, uint4* to) {
  constexpr int threads = Memory<D, 1>::threads, values = Memory<D, 1>::values;
  if constexpr (!Adjoint) {
#pragma unroll 4
    for (int i = threadIdx.x; i < D * D / 8; i += threads) {
      const int u = i % (D / 8), n = i / (D / 8);
      const int row = coordinate<D, Interleaved>(plane_of<Interleaved>(n), n % 2);
      copy_values<T, 8>(basis + row * D + u * 8, to + n / 64 * values + piece(n, u));
    }
  } else {
    // A column is that of a thread's neighbouring values: 32 of a row for each 4 threads, 8 for each, 2 for each j.
    const int column = threadIdx.x % (D / 2) * 2, pass = column / 64;
    const int j = column % 64 / 32 * 4 + column % 8 / 2, t = column % 32 / 8;
#pragma unroll 8
    for (int row = threadIdx.x / (D / 2); row < D; row += threads / (D / 2)) {
      uint32_t* piece_of_row = reinterpret_cast<uint32_t*>(to + pass * values + row * 8 + (j ^ row % 8));
      copy_values<T, 2>(basis + row * D + column, piece_of_row + t);
    }
  }
}

// A tile's place in the order of work: items, then tokens, then sets, so that divisions are done once a block.
struct Walk {
  int set, sequence, i_tile, batch, head;

  template <typename T>
  __device__ __forceinline__ Walk(const BasisArgs<T>& args, uint32_t unit) {
    const int heads = args.shape.heads();
    head = unit % heads;
    unit /= heads;
    batch = unit % args.batches;
    unit /= args.batches;
    i_tile = unit % args.row_tiles;
    unit /= args.row_tiles;
    sequence = unit % args.sequences;
    set = unit / args.sequences;
  }

  // To the next; whether it is of other tokens or of another set.
  template <typename T>
  __device__ __forceinline__ bool advance(const BasisArgs<T>& args) {
    if (++head < args.shape.heads()) {
      return false;
    }
    head = 0;
    if (++batch < args.batches) {
      return false;
    }
    batch = 0;
    if (++i_tile == args.row_tiles) {
      i_tile = 0;
      if (++sequence == args.sequences) {
        sequence = 0;
        ++set;
      }
    }
    return true;
  }
};

// What is left to know of a tile once its values are on their way.
template <typename T>
struct Tile {
  T* y;             // token 0
  int from, until;  // its tokens that have a position; those before `from` are the prefix
  int set;
  bool fresh;  // other tokens than those of the tile before
};
static_assert(sizeof(Tile<Half>) <= 32);

// Starts to copy a tile of x; tokens before `from` become zero.
template <int D, typename T>
__device__ __forceinline__ void fetch_values(const View<const T>& x, int64_t b, int h, int first, int from, int until,
                                             uint4* stage) {
  constexpr int threads = Memory<D, 1>::threads, per_row = D / 8, rows = threads / per_row;
  const int u = threadIdx.x % per_row, i = threadIdx.x / per_row;
  const T* start = x.at(b, h, first);
  const T* source = start + i * x.stride.l + u * 8;
  uint4* to = stage + piece(i, u);  // a step of 16 rows keeps the swizzle
#pragma unroll
  for (int n = 0; n < tile; n += rows) {
    const bool inside = from <= n + i && n + i < until;
    copy_async<16>(to + n * 8, inside ? source : start, inside);
    source += rows * x.stride.l;
  }
}

// Starts to copy the tile of q or k at a place, of `other` too where it is given, and the coordinates of its tokens,
// (tile, Coords), zero for those of the prefix.
template <int D, int Coords, typename T>
__device__ __forceinline__ void fetch(const BasisArgs<T>& args, const Walk& at, bool fresh, uint4* stage,
                                      float* positions, Tile<T>* tile_info, uint4* other_stage = nullptr) {
  constexpr int threads = Memory<D, Coords>::threads;
  const Shape& shape = args.shape;
  const int nq = shape.query_heads(), nk = shape.heads() - nq, first = at.i_tile * tile;
  const int64_t b = shape.batch_positions ? at.sequence : at.batch;
  const bool is_query = at.head < nq;
  const int h = is_query ? at.set * nq + at.head : at.set * nk + at.head - nq;
  const int until = min(static_cast<int64_t>(tile), shape.L - first);
  const int prefix = max(int64_t{0}, shape.prefix - first);
  if (threadIdx.x == 0) {
    T* y = (is_query ? args.yq : args.yk) + ((b * (is_query ? shape.H : shape.Hk) + h) * shape.L + first) * D;
    *tile_info = {y, prefix, until, at.set, fresh};
  }
  fetch_values<D>(is_query ? args.q : args.k, b, h, first, 0, until, stage);
  if (other_stage != nullptr) {
    fetch_values<D>(is_query ? args.other_q : args.other_k, b, h, first, prefix, until, other_stage);
  }
  const float* position = args.positions + (at.sequence * shape.tokens() + first - shape.prefix) * shape.C;
#pragma unroll
  for (int n = threadIdx.x; n < tile * Coords; n += threads) {
    const int token = n / Coords, m = n % Coords;
    const bool inside = token < until && token >= prefix && m < shape.C;
    copy_async<4>(positions + n, inside ? position + token * shape.C + m : args.positions, inside);
  }
}

// `factor` times cos, and `sign` that times sin, of planes [r, r + N) at a position.
template <int Coords, typename T, int N>
__device__ __forceinline__ void phases(const BasisArgs<T>& args, const float* hi, const float* lo,
                                       const float* position, int r, float factor, float sign, float* c, float* s) {
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
    c[j] *= factor;
    s[j] *= factor * sign;
  }
}

// A contiguous copy.
inline Tensor copy_of(const Tensor& x, ScalarType dtype) {
  const auto sizes = x.sizes();
  Tensor y = new_empty(x, {sizes.begin(), sizes.end()}, dtype);
  torch::stable::copy_(y, x);
  return y;
}

// Whether a tensor begins at a multiple of 16 bytes.
inline bool aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// Values (B, H, L, D), or a copy, with every row at a multiple of 16 bytes.
inline Tensor with_aligned_rows(const Tensor& x) {
  const Strides stride = strides_of(x);
  const bool even = stride.b % 8 == 0 && stride.h % 8 == 0 && stride.l % 8 == 0;
  return stride.d == 1 && even && aligned(x) ? x : copy_of(x, x.scalar_type());
}

// A basis, or a copy, in the dtype of the values, or in float32 where the kernel `rounds`; its rows are contiguous, or
// its columns where the kernel takes `columns`.
inline Tensor operand_of(const Tensor& basis, ScalarType dtype, bool rounds, bool columns) {
  const int64_t n = basis.dim(), D = basis.size(n - 1), row = basis.stride(n - 2), column = basis.stride(n - 1);
  const bool dense = (row == D && column == 1) || (columns && row == 1 && column == D);
  const bool wide = rounds && basis.scalar_type() == ScalarType::Float;
  if (dense && aligned(basis) && (n == 2 || basis.stride(0) % 8 == 0) && (wide || basis.scalar_type() == dtype)) {
    return basis;
  }
  return copy_of(basis, wide ? ScalarType::Float : dtype);
}

inline int attribute(const Tensor& x, cudaDeviceAttr which) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, x.get_device_index()));
  return value;
}

// A set's frequencies in turns, (C, R) of the leading parts and then of the rest.
template <int D, typename T>
__device__ __forceinline__ void fill_frequencies(const BasisArgs<T>& args, int set, float* hi) {
  static_assert(max_coords * (D / 2) <= Memory<D, 1>::threads);
  const int count = args.shape.C * (D / 2), i = threadIdx.x;
  if (i < count) {
    const Turns<float> w = turns(args.freqs[set * args.freq_set + i]);
    hi[i] = w.hi;
    hi[count + i] = w.lo;
  }
}

// Which cosines and sines a thread keeps: of two tokens, planes [first, first + 4) and [second, second + 4).
struct Kept {
  int token, next_token, first, second;

  // Those of pieces u and u + D / 16 of two rows, u = threadIdx.x % (D / 16), spread over the banks.
  template <int D, bool Interleaved>
  __device__ __forceinline__ static Kept of_pieces() {
    const int u = threadIdx.x % (D / 16), k = threadIdx.x / (D / 16);
    const int first = u * (Interleaved ? 4 : 8);
    return {k / 8 * 8 + k % 2 * 4 + k % 8 / 2, 32, first, first + (Interleaved ? D / 4 : 4)};
  }
};

template <int Coords, typename T>
__device__ __forceinline__ void keep_phases(const BasisArgs<T>& args, const float* hi, const float* positions,
                                            const Kept& kept, float (&c)[2][8], float (&s)[2][8]) {
  const float* lo = hi + args.shape.C * args.shape.R;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* position = positions + (kept.token + i * kept.next_token) * Coords;
    phases<Coords, T, 4>(args, hi, lo, position, kept.first, args.factor, args.sign, c[i], s[i]);
    phases<Coords, T, 4>(args, hi, lo, position, kept.second, args.factor, args.sign, c[i] + 4, s[i] + 4);
  }
}

// Turns the planes of two pieces of a row.
template <bool Interleaved, typename T>
__device__ __forceinline__ void turn_pieces(Vec<T, 8>& x, Vec<T, 8>& z, const float (&c)[8], const float (&s)[8]) {
  float a[8], b[8];
  widen<T, 8>(a, x);
  widen<T, 8>(b, z);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if constexpr (Interleaved) {
      turn(j < 4 ? a[2 * j] : b[2 * j - 8], j < 4 ? a[2 * j + 1] : b[2 * j - 7], c[j], s[j]);
    } else {
      turn(a[j], b[j], c[j], s[j]);
    }
  }
  x = narrow<T, 8>(a);
  z = narrow<T, 8>(b);
}

// Turns a tile where it lies. The prefix is left, since it is copied from there.
template <int D, bool Interleaved, typename T>
__device__ __forceinline__ void turn_in_place(uint4* stage, const Tile<T>& now, const Kept& kept, float (&c)[2][8],
                                              float (&s)[2][8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = kept.token + i * kept.next_token, u = threadIdx.x % (D / 16);
    Vec<T, 8>* x = reinterpret_cast<Vec<T, 8>*>(stage + piece(row, u));
    Vec<T, 8>* z = reinterpret_cast<Vec<T, 8>*>(stage + piece(row, u + D / 16));
    Vec<T, 8> a = *x, b = *z;
    turn_pieces<Interleaved, T>(a, b, c[i], s[i]);
    if (row >= now.from) {
      *x = a;
      *z = b;
    }
  }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// sums (64 tokens x this warpgroup's 64 columns) = a tile times a basis, as fill_basis lays it out.
template <int D, bool Adjoint, typename T>
__device__ __forceinline__ void multiply_basis(float (&sums)[32], const uint4* stage, const uint4* basis) {
  basis += threadIdx.x / 128 * Memory<D, 1>::values;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    const int at = step / 4 * Memory<D, 1>::slab + step % 4 * 2;
    multiply<T, Adjoint ? Inner::b : Inner::none>(sums, operand(stage + at),
                                                  operand(basis + (Adjoint ? step * 128 : at)), step > 0);
  }
}
#endif

// Stores this thread's part of a product, pairs of neighbours (a, b).
template <int D, typename T>
__device__ __forceinline__ void store_row(T* y, const float (&a)[8], const float (&b)[8]) {
  const int pass = threadIdx.x / 128, t = threadIdx.x % 4;
  const float low[8] = {a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};
  const float high[8] = {a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
  store<T, 8>(y + pass * 64 + t * 8, narrow<T, 8>(low));
  store<T, 8>(y + pass * 64 + 32 + t * 8, narrow<T, 8>(high));
}

// Tokens of the prefix are copied bit for bit; few tiles have any.
template <int D, typename T>
__device__ __forceinline__ void copy_prefix(const uint4* stage, const Tile<T>& now) {
  for (int n = threadIdx.x; n < min(now.from, now.until) * (D / 8); n += Memory<D, 1>::threads) {
    const int u = n % (D / 8), i = n / (D / 8);
    *reinterpret_cast<uint4*>(now.y + i * D + u * 8) = stage[piece(i, u)];
  }
}

// Checks the arguments and lays them out; sizes of shape are final then.
struct BasisProblem {
  Shape shape;
  int freq_sets, basis_sets;

  BasisProblem(const char* op, const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& freqs,
               const Tensor& basis, int64_t prefix)
      : shape(shape_of(op, q, k, positions, freqs, prefix, false)) {
    check_like(op, "basis", basis, basis.scalar_type(), q);
    const int64_t n = basis.dim();
    STD_TORCH_CHECK(
        (n == 2 || n == 3) && basis.size(n - 1) == shape.D && basis.size(n - 2) == shape.D && 2 * shape.R == shape.D,
        op, ": basis must have shape (D, D) or (H, D, D), and freqs D // 2 planes");
    STD_TORCH_CHECK(shape.D == 64 || shape.D == 128, op, ": D must be 64 or 128");
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half, op,
                    ": q must have dtype float16 or bfloat16");
    freq_sets = shape.sets;
    basis_sets = n == 3 ? static_cast<int>(basis.size(0)) : 1;
    STD_TORCH_CHECK(freq_sets == 1 || basis_sets == 1 || freq_sets == basis_sets, op,
                    ": basis and freqs must have the same number of heads");
    // A set is what shares frequencies and basis.
    shape.sets = std::max(freq_sets, basis_sets);
    STD_TORCH_CHECK(shape.H % shape.sets == 0 && shape.Hk % shape.sets == 0, op,
                    ": the heads of q and k must be multiples of those of basis");
    check_limits(op, shape);
    STD_TORCH_CHECK(tiles() < (int64_t{1} << 31) && shape.heads() < 2 * 65536, op,
                    ": q and k are too large for one launch; rotate them in parts");
    STD_TORCH_CHECK(attribute(q, cudaDevAttrComputeCapabilityMajor) == 9, op,
                    ": q must be on a GPU of compute capability 9");
  }

  int64_t tiles() const {
    return int64_t{ceil_div(shape.L, tile)} * shape.B * (shape.H + shape.Hk);
  }

  // Of values with aligned rows and a basis as operand_of gives them.
  template <typename T>
  BasisArgs<T> args(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& freqs, const Tensor& basis,
                    double factor, bool inverse, Tensor& yq, Tensor& yk) const {
    BasisArgs<T> args{};
    args.shape = shape;
    args.q = input<T>(q);
    args.k = input<T>(k);
    args.yq = static_cast<T*>(yq.mutable_data_ptr());
    args.yk = static_cast<T*>(yk.mutable_data_ptr());
    args.positions = static_cast<const float*>(positions.const_data_ptr());
    args.freqs = static_cast<const float*>(freqs.const_data_ptr());
    args.basis = basis.const_data_ptr();
    args.wide = basis.scalar_type() == ScalarType::Float;
    args.columns = basis.stride(basis.dim() - 2) == 1;
    args.basis_set = basis_sets > 1 ? basis.stride(0) : 0;
    args.freq_set = freq_sets > 1 ? static_cast<int64_t>(shape.C) * shape.R : 0;
    args.factor = static_cast<float>(factor);
    args.sign = inverse ? -1.0f : 1.0f;
    args.query_heads = shape.query_heads();
    args.key_heads = shape.heads() - args.query_heads;
    args.row_tiles = ceil_div(shape.L, tile);
    args.sequences = shape.batch_positions ? shape.B : 1;
    args.batches = shape.batch_positions ? 1 : shape.B;
    return args;
  }

  // Calls launch(D, interleaved, coordinates) with what the kernels are compiled for.
  template <typename Launch>
  void dispatch(bool interleaved, const Launch& launch) const {
    const auto with_coords = [&](auto d, auto layout) {
      if (shape.C == 1) {
        launch(d, layout, std::integral_constant<int, 1>{});
      } else if (shape.C == 2) {
        launch(d, layout, std::integral_constant<int, 2>{});
      } else {
        launch(d, layout, std::integral_constant<int, max_coords>{});
      }
    };
    const auto with_layout = [&](auto d) {
      interleaved ? with_coords(d, std::true_type{}) : with_coords(d, std::false_type{});
    };
    shape.D == 64 ? with_layout(std::integral_constant<int, 64>{}) : with_layout(std::integral_constant<int, 128>{});
  }
};

}  // namespace rotary
}  // namespace fastrpe
