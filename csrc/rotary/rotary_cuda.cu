#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../common/cuda.cuh"
#include "rotary_args.h"
#include "rotary_cuda.h"
#include "rotary_phase.cuh"
#include "rotary_slots.cuh"

// A thread holds the phases of N planes of a row and rotates those planes in U of the row's items: their loads are on
// their way while it computes the sines, and the rest is a copy. The backward with gradients of the angles is the same
// kernel in a loop over rows and items, with sums at the end.
namespace fastrpe {
namespace rotary {
namespace {

constexpr int threads = 128;
constexpr int bwd_chunk = 16, bwd_rows = 32;  // items a thread of the backward takes for a row, and rows for few items
constexpr int least_chunk = 4;                // of small problems, which then keep more multiprocessors busy
constexpr int most_slots = 1024;              // that one kernel adds

// How a thread's 2 N values of a row lie: two runs of N, at a and b.
struct Slot {
  int plane;  // first of its N planes
  int a, b;
  bool rotates, has_b;
};

template <int N>
__host__ __device__ __forceinline__ int slots_rotating(int R) {
  return (R + N - 1) / N;
}

template <int N>
__host__ __device__ __forceinline__ int slots(int R, int D) {
  return slots_rotating<N>(R) + (D - 2 * R + 2 * N - 1) / (2 * N);
}

template <int N, bool Interleaved>
__device__ __forceinline__ Slot slot_of(int g, int R, int D) {
  const int rotating = slots_rotating<N>(R);
  if (g < rotating) {
    return Interleaved ? Slot{g * N, 2 * g * N, (2 * g + 1) * N, true, true}
                       : Slot{g * N, g * N, R + g * N, true, true};
  }
  const int a = 2 * R + 2 * (g - rotating) * N;
  return {0, a, a + N, false, a + N < D};
}

// Turns the planes held in (a, b) by their angles.
template <bool Interleaved, typename A, int N>
__device__ __forceinline__ void turn_planes(A (&a)[N], A (&b)[N], const A (&c)[N], const A (&s)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if constexpr (Interleaved && N > 1) {
      A* half = j < N / 2 ? a : b;
      const int i = 2 * j % N;
      turn(half[i], half[i + 1], c[j], s[j]);
    } else {
      turn(a[j], b[j], c[j], s[j]);
    }
  }
}

// <x, J dx> per plane, the derivative by the angle.
template <bool Interleaved, typename A, int N>
__device__ __forceinline__ void add_angle_gradient(A (&d)[N], const A (&xa)[N], const A (&xb)[N], const A (&da)[N],
                                                   const A (&db)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if constexpr (Interleaved && N > 1) {
      const A* x = j < N / 2 ? xa : xb;
      const A* dx = j < N / 2 ? da : db;
      const int i = 2 * j % N;
      d[j] += x[i] * dx[i + 1] - x[i + 1] * dx[i];
    } else {
      d[j] += xa[j] * db[j] - xb[j] * da[j];
    }
  }
}

// A row's stride along D is 1 wherever N > 1.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load_at(const T* row, int i, int64_t d) {
  return load<T, N>(row + (N == 1 ? i * d : i));
}

template <typename T>
struct Args {
  using A = acc_t<T>;
  Shape shape;
  View<const T> q, k;  // what is rotated: x, or dy in the backward
  View<T> yq, yk;      // contiguous
  const A* first;      // positions or cos
  const A* second;     // freqs or sin
  A factor, sign;      // sign of the sines: -1 turns back
  uint32_t tiles;      // of rows
  // The backward with gradients of the angles alone.
  View<const T> xq, xk;
  int chunk, tile;  // items a thread rotates for each of its rows, rows of a block
  A angle_sign;
  A* freq_sums;      // (row tiles, item chunks, sets, C, R), or null
  A* position_sums;  // (sets, item chunks, points, C), or null
};

template <typename T, int N, bool IsTable>
__device__ __forceinline__ void phases(const Args<T>& args, int set, int plane, int64_t token, acc_t<T> (&c)[N],
                                       acc_t<T> (&s)[N]) {
  using A = acc_t<T>;
  const int R = args.shape.R;
  if constexpr (IsTable) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      c[j] = args.first[token * R + plane + j];
      s[j] = args.sign * args.second[token * R + plane + j];
    }
  } else {
    const int C = args.shape.C;
    const A* position = args.first + token * C;
    const A* freqs = args.second + static_cast<int64_t>(set) * C * R + plane;
    Phase<A> phase[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      phase[j] = product(position[0], turns(freqs[j]));
    }
    for (int i = 1; i < C; ++i) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        accumulate<T>(phase[j], product(position[i], turns(freqs[i * R + j])));
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      phase_cos_sin<T>(phase[j], c[j], s[j]);
      c[j] *= args.factor;
      s[j] *= args.factor * args.sign;
    }
  }
}

// Steps through a chunk of a row's items: (sequence, head), with the heads of q before those of k.
struct Cursor {
  int left, b, j;
};

__device__ __forceinline__ Cursor cursor_at(const Shape& shape, RowOf row, uint32_t i_chunk, int chunk) {
  const uint32_t begin = i_chunk * chunk, heads = shape.heads(), b = begin / heads;
  return {static_cast<int>(min(static_cast<uint32_t>(chunk), static_cast<uint32_t>(shape.items()) - begin)),
          static_cast<int>(shape.batch_positions ? row.sequence : b), static_cast<int>(begin - b * heads)};
}

// U items on their way: all loads are issued before the first is used.
template <typename T, int N, int U, bool WithX>
struct Batch {
  Vec<T, N> a[U], b[U], xa[WithX ? U : 1], xb[WithX ? U : 1];
  T* out[U];

  __device__ __forceinline__ void load(const Args<T>& args, const Slot& slot, int set, uint32_t l, Cursor& cursor) {
    const int heads = args.shape.heads(), nq = args.shape.query_heads(), nk = heads - nq;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      out[u] = nullptr;
      if (cursor.left > 0) {
        const bool is_query = cursor.j < nq;
        const int64_t h = is_query ? set * nq + cursor.j : set * nk + cursor.j - nq;
        const T* in = is_query ? args.q.at(cursor.b, h, l) : args.k.at(cursor.b, h, l);
        const int64_t d = is_query ? args.q.stride.d : args.k.stride.d;
        out[u] = is_query ? args.yq.at(cursor.b, h, l) : args.yk.at(cursor.b, h, l);
        a[u] = load_at<T, N>(in, slot.a, d);
        if (slot.has_b) {
          b[u] = load_at<T, N>(in, slot.b, d);
        }
        if constexpr (WithX) {
          const T* x = is_query ? args.xq.at(cursor.b, h, l) : args.xk.at(cursor.b, h, l);
          const int64_t xd = is_query ? args.xq.stride.d : args.xk.stride.d;
          xa[u] = load_at<T, N>(x, slot.a, xd);
          if (slot.has_b) {
            xb[u] = load_at<T, N>(x, slot.b, xd);
          }
        }
        --cursor.left;
        if (++cursor.j == heads) {
          cursor.j = 0;
          ++cursor.b;
        }
      }
    }
  }

  template <bool Interleaved>
  __device__ __forceinline__ void rotate(const Slot& slot, bool copies, const acc_t<T> (&c)[N], const acc_t<T> (&s)[N],
                                         acc_t<T> (&d_angle)[N]) {
    using A = acc_t<T>;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (out[u] == nullptr) {
        continue;
      }
      if (!copies) {
        A va[N], vb[N];
        widen<T, N>(va, a[u]);
        widen<T, N>(vb, b[u]);
        turn_planes<Interleaved>(va, vb, c, s);
        if constexpr (WithX) {
          A wa[N], wb[N];
          widen<T, N>(wa, xa[u]);
          widen<T, N>(wb, xb[u]);
          add_angle_gradient<Interleaved>(d_angle, wa, wb, va, vb);
        }
        a[u] = narrow<T, N>(va);
        b[u] = narrow<T, N>(vb);
      }
      store<T, N>(out[u] + slot.a, a[u]);
      if (slot.has_b) {
        store<T, N>(out[u] + slot.b, b[u]);
      }
    }
  }
};

// Grid (row tiles x item chunks, 1, sets).
template <typename T, int N, bool Interleaved, bool IsTable, int U>
__global__ void __launch_bounds__(threads, U == 4 ? 5 : 8) rotate_fwd_kernel(const Args<T> args) {
  const Shape& shape = args.shape;
  const uint32_t per_row = slots<N>(shape.R, shape.D), i_chunk = blockIdx.x / args.tiles;
  const int64_t index = static_cast<int64_t>(blockIdx.x - i_chunk * args.tiles) * threads + threadIdx.x;
  if (index >= shape.rows() * per_row) {
    return;
  }
  const uint32_t i_row = index / per_row;
  const Slot slot = slot_of<N, Interleaved>(index - static_cast<int64_t>(i_row) * per_row, shape.R, shape.D);
  const RowOf row = row_of(shape, i_row);
  const bool copies = !slot.rotates || row.l < shape.prefix;
  Batch<T, N, U, false> batch;
  Cursor cursor = cursor_at(shape, row, i_chunk, U);
  batch.load(args, slot, blockIdx.z, row.l, cursor);
  acc_t<T> c[N], s[N], unused[N];
  if (!copies) {
    phases<T, N, IsTable>(args, blockIdx.z, slot.plane, token_of(shape, row), c, s);
  }
  batch.template rotate<Interleaved>(slot, copies, c, s, unused);
}

// q and k are dy. Adds up the derivatives by the angles: over a block's rows for the frequencies, over a row's planes
// for its position. Every block writes sums of its own, added in a fixed order afterwards. Grid (row tiles, item
// chunks, sets).
template <typename T, int N, bool Interleaved>
__global__ void __launch_bounds__(N == 1 ? 1024 : threads) rotate_bwd_kernel(const Args<T> args) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) char memory[];
  const Shape& shape = args.shape;
  const int per_row = slots<N>(shape.R, shape.D), R = shape.R, C = shape.C, set = blockIdx.z;
  const int at_a_time = blockDim.x / per_row, lane = threadIdx.x / per_row;
  const Slot slot = slot_of<N, Interleaved>(threadIdx.x % per_row, R, shape.D);
  A* plane_sums = reinterpret_cast<A*>(memory);  // (C, rows at a time, R): a thread adds to places of its own
  A* row_sums = plane_sums + C * at_a_time * R;  // (threads)
  A* own = plane_sums + lane * R + slot.plane;
  if (lane < at_a_time && slot.rotates) {
    for (int i = 0; i < C * N; ++i) {
      own[i / N * at_a_time * R + i % N] = 0;
    }
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x) * args.tile;
  const int64_t last = min(first + args.tile, shape.rows());
  for (int64_t start = first; start < last; start += at_a_time) {
    const bool active = lane < at_a_time && start + lane < last;
    const RowOf row = row_of(shape, active ? start + lane : start);
    const bool copies = !slot.rotates || row.l < shape.prefix;
    const int64_t token = token_of(shape, row);
    A d_angle[N] = {};
    if (active) {
      constexpr int U = sizeof(T) * N == 16 ? 2 : 1;
      Batch<T, N, U, true> batch;
      Cursor cursor = cursor_at(shape, row, blockIdx.y, args.chunk);
      batch.load(args, slot, set, row.l, cursor);
      A c[N], s[N];
      if (!copies) {
        phases<T, N, false>(args, set, slot.plane, token, c, s);
      }
      while (true) {
        batch.template rotate<Interleaved>(slot, copies, c, s, d_angle);
        if (cursor.left == 0) {
          break;
        }
        batch.load(args, slot, set, row.l, cursor);
      }
    }
    const bool counts = active && !copies;
    for (int i = 0; i < C; ++i) {
      A sum = 0;
      if (counts) {
        const A position = args.first[token * C + i];
        const A* freqs = args.second + (static_cast<int64_t>(set) * C + i) * R + slot.plane;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          own[i * at_a_time * R + j] += position * d_angle[j];
          sum += freqs[j] * d_angle[j];
        }
      }
      if (args.position_sums != nullptr) {
        __syncthreads();
        row_sums[threadIdx.x] = sum;
        __syncthreads();
        if (counts && slot.plane == 0) {
          for (int g = 1; g < slots_rotating<N>(R); ++g) {
            sum += row_sums[threadIdx.x + g];
          }
          const int64_t points = (shape.batch_positions ? shape.B : 1) * shape.tokens();
          args.position_sums[((set * static_cast<int64_t>(gridDim.y) + blockIdx.y) * points + token) * C + i] =
              args.angle_sign * sum;
        }
      }
    }
  }
  if (args.freq_sums != nullptr) {
    __syncthreads();
    const int64_t block = blockIdx.x * static_cast<int64_t>(gridDim.y) + blockIdx.y;
    A* out = args.freq_sums + (block * shape.sets + set) * C * R;
    for (int i = threadIdx.x; i < C * R; i += blockDim.x) {
      A sum = 0;
      for (int n = 0; n < at_a_time; ++n) {
        sum += plane_sums[(i / R * at_a_time + n) * R + i % R];
      }
      out[i] = args.angle_sign * sum;
    }
  }
}

bool aligned(const void* data, const Strides& stride, int64_t size, int N) {
  return reinterpret_cast<uintptr_t>(data) % (size * N) == 0 && stride.d == 1 && stride.b % N == 0 &&
         stride.h % N == 0 && stride.l % N == 0;
}

// The widest access that every row allows: 16 bytes, 8, or one value.
template <typename T>
int width(const Shape& shape, std::initializer_list<View<const T>> views) {
  for (int N = 16 / sizeof(T); N > 1 && N * sizeof(T) >= 8; N /= 2) {
    bool fits = shape.R % N == 0 && shape.D % N == 0;
    for (const auto& view : views) {
      fits = fits && aligned(view.data, view.stride, sizeof(T), N);
    }
    if (fits) {
      return N;
    }
  }
  return 1;
}

// Calls f with N and the layout as constants.
template <typename T, typename F>
void dispatch_width(int N, bool interleaved, F&& f) {
  const auto with = [&](auto n) {
    if (interleaved) {
      f(n, std::true_type{});
    } else {
      f(n, std::false_type{});
    }
  };
  if (N == 16 / sizeof(T)) {
    return with(std::integral_constant<int, 16 / sizeof(T)>{});
  }
  if constexpr (sizeof(T) < 8) {
    if (N == 8 / sizeof(T)) {
      return with(std::integral_constant<int, 8 / sizeof(T)>{});
    }
  }
  // A pair of single values is described by its two offsets alone.
  return with(std::integral_constant<int, 1>{});
}

template <typename T>
Args<T> args_of(const Shape& shape, const Tensor& q, const Tensor& k, Tensor& yq, Tensor& yk, const Tensor& first,
                const Tensor& second, double factor, bool inverse) {
  using A = acc_t<T>;
  Args<T> args{};
  args.shape = shape;
  args.q = input<T>(q);
  args.k = input<T>(k);
  args.yq = output<T>(yq);
  args.yk = output<T>(yk);
  args.first = static_cast<const A*>(first.const_data_ptr());
  args.second = static_cast<const A*>(second.const_data_ptr());
  args.factor = static_cast<A>(factor);
  args.sign = inverse ? -1 : 1;
  return args;
}

std::tuple<Tensor, Tensor> rotate_any(const char* op, const Tensor& q, const Tensor& k, const Tensor& first,
                                      const Tensor& second, bool is_table, bool interleaved, bool inverse,
                                      double factor, int64_t prefix) {
  const Shape shape = shape_of(op, q, k, first, second, prefix, is_table);
  check_limits(op, shape);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor yq = new_empty_like(q), yk = new_empty_like(k);
  if (shape.rows() * shape.items() * shape.D == 0) {
    return {yq, yk};
  }
  dispatch_float(q.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    Args<T> args = args_of<T>(shape, q, k, yq, yk, first, second, factor, inverse);
    dispatch_width<T>(width<T>(shape, {args.q, args.k}), interleaved, [&](auto n, auto layout) {
      constexpr int N = n;
      constexpr bool Interleaved = layout;
      args.tiles = ceil_div(shape.rows() * slots<N>(shape.R, shape.D), threads);
      const auto launch = [&](auto u, auto table) {
        const int64_t blocks = static_cast<int64_t>(args.tiles) * ceil_div(shape.items(), u);
        STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op,
                        ": q and k are too large for one launch; rotate them in parts");
        rotate_fwd_kernel<T, N, Interleaved, table, u>
            <<<dim3(blocks, 1, shape.sets), threads, 0, current_stream(q)>>>(args);
      };
      using std::integral_constant;
      if (is_table) {
        launch(integral_constant<int, 4>{}, std::true_type{});
      } else if (shape.items() > 2) {
        launch(integral_constant<int, 4>{}, std::false_type{});
      } else {
        launch(integral_constant<int, 2>{}, std::false_type{});
      }
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {yq, yk};
}

// Sum over the first of (n, rest).
template <typename A>
Tensor add_up(const Tensor& sums, const Tensor& like) {
  const auto sizes = like.sizes();
  if (sums.size(0) > most_slots) {  // PyTorch spreads them over several blocks
    const int64_t over[1] = {0};
    return torch::stable::reshape(torch::stable::sum(sums, over), sizes);
  }
  Tensor total = new_empty(like, {sizes.begin(), sizes.end()}, sums.scalar_type());
  add_slots(Slots<A>{static_cast<const A*>(sums.const_data_ptr()), static_cast<A*>(total.mutable_data_ptr()), 1,
                     sums.size(0), sums.size(1)},
            Slots<A>{}, current_stream(like));
  return total;
}

}  // namespace

std::tuple<Tensor, Tensor> rotate_cuda(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& freqs,
                                       bool interleaved, bool inverse, double factor, int64_t prefix) {
  return rotate_any("rotate", q, k, positions, freqs, false, interleaved, inverse, factor, prefix);
}

std::tuple<Tensor, Tensor> rotate_cos_sin_cuda(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                               bool interleaved, bool inverse, int64_t prefix) {
  return rotate_any("rotate_cos_sin", q, k, cos, sin, true, interleaved, inverse, 1.0, prefix);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rotate_bwd_cuda(const Tensor& dyq, const Tensor& dyk, const Tensor& q,
                                                           const Tensor& k, const Tensor& positions,
                                                           const Tensor& freqs, bool interleaved, bool inverse,
                                                           double factor, int64_t prefix, bool need_positions,
                                                           bool need_freqs) {
  const char* op = "rotate_bwd";
  const Shape shape = shape_of(op, q, k, positions, freqs, prefix, false);
  check_gradients(op, dyq, dyk, q, k);
  check_limits(op, shape);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const ScalarType acc = acc_dtype(q.scalar_type());
  Tensor dq = new_empty_like(q), dk = new_empty_like(k);
  Tensor dpositions = new_empty(q, {0}, q.scalar_type()), dfreqs = dpositions;
  const bool empty = shape.rows() * shape.items() * shape.D == 0;
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, q.get_device_index()));
  dispatch_float(q.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    Args<T> args = args_of<T>(shape, dyq, dyk, dq, dk, positions, freqs, factor, !inverse);
    args.xq = input<T>(q);
    args.xk = input<T>(k);
    args.angle_sign = inverse ? -1 : 1;
    dispatch_width<T>(width<T>(shape, {args.q, args.k, args.xq, args.xk}), interleaved, [&](auto n, auto layout) {
      constexpr int N = n;
      constexpr bool Interleaved = layout;
      const int per_row = std::max(1, slots<N>(shape.R, shape.D));
      const int block = std::max(threads, (per_row + 31) / 32 * 32), at_a_time = block / per_row;
      STD_TORCH_CHECK(block <= (N == 1 ? 1024 : threads), op,
                      ": the native kernel takes head sizes up to D = 2048; use backend='reference'");
      // grid.y has at most 65535 blocks
      args.chunk = static_cast<int>(std::max<int64_t>(bwd_chunk, (shape.items() + 65534) / 65535));
      const int64_t per_thread = std::min<int64_t>(args.chunk, std::max<int64_t>(1, shape.items()));
      args.tile = at_a_time * static_cast<int>(std::max<int64_t>(1, bwd_rows / per_thread));
      const auto grid_of = [&] {
        return dim3(ceil_div(shape.rows(), args.tile), ceil_div(shape.items(), args.chunk), shape.sets);
      };
      dim3 grid = grid_of();
      const auto is_small = [&] { return int64_t{grid.x} * grid.y * grid.z < 4 * multiprocessors; };
      if (is_small()) {
        args.tile = at_a_time;
        grid = grid_of();
      }
      while (is_small() && args.chunk > least_chunk) {
        args.chunk /= 2;
        grid = grid_of();
      }
      // Sums of nothing are zero, as are those over no planes, which no thread would write.
      const int64_t tiles = empty ? 0 : static_cast<int64_t>(grid.x) * grid.y;
      const int64_t chunks = empty || shape.R == 0 ? 0 : static_cast<int64_t>(shape.sets) * grid.y;
      Tensor freq_sums = new_empty(q, {need_freqs ? tiles : 0, freqs.numel()}, acc);
      Tensor position_sums = new_empty(q, {need_positions ? chunks : 0, positions.numel()}, acc);
      args.freq_sums = need_freqs ? static_cast<A*>(freq_sums.mutable_data_ptr()) : nullptr;
      args.position_sums = need_positions && chunks > 0 ? static_cast<A*>(position_sums.mutable_data_ptr()) : nullptr;
      if (!empty) {
        const size_t shared = sizeof(A) * (block + static_cast<size_t>(shape.C) * at_a_time * shape.R);
        rotate_bwd_kernel<T, N, Interleaved><<<grid, block, shared, current_stream(q)>>>(args);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      if (need_freqs) {
        dfreqs = add_up<A>(freq_sums, freqs);
      }
      if (need_positions) {
        dpositions = add_up<A>(position_sums, positions);
      }
    });
  });
  return {dq, dk, dpositions, dfreqs};
}

}  // namespace rotary
}  // namespace fastrpe
