#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "linear_attention_causal_bwd_walks.cuh"
#include "linear_attention_cuda.h"

// Gradients of causal, normalised attention by exponential features, in bfloat16. With s_jf and t_if the exponents of
// keys and queries, p_ij = sum_f 2^(t_if + s_jf - lse_i) for j <= i sums to 1 over j, and
//
//   delta_i = dout_i . out_i,   dp_ij = dout_i . v_j - delta_i   for j <= i, else 0
//   dt_if = sum_j 2^(t_if + s_jf - lse_i) dp_ij,   dq = scale dt W
//   ds_jf = sum_i 2^(t_if + s_jf - lse_i) dp_ij,   dk = scale ds W - scale^2 k sum_f ds,   dv_j = sum_i p_ij dout_i
//
// and dW = scale (dt^T q + ds^T k). One walk goes forwards, with the sums over the keys of earlier tiles, and finds
// lse, delta and dq; another goes backwards, with the sums over the queries of later tiles, and finds dk and dv. Within
// a tile all pairs are products of 64 x 64. A warpgroup has 64 features, of all 64 rows of a tile.
//
// Few heads are divided into segments of tiles, each a block: the sums of each are taken first, and those of all before
// it (for queries, behind it) added. A block leaves its part of dW in a slot; slots are added in order, so the result
// is deterministic.
//
// What cancels is not rounded to 8 bits: delta_i is a sum of unrounded products, dp and the sums over other tiles enter
// a product in two parts, as ds does where it makes dk. Where few keys or features have most of the weight, the error
// of one rounding would be as large as a gradient's tolerance.
//
// Sums over keys are relative to 2^c_f, with c_f the largest exponent of the feature so far, those over queries
// relative to the largest t_if - lse_i from the last row on. A tile has one such maximum where it ends: rows that do
// not see it lose what is far below, so that a tile in which a maximum grows by more than `limit` is done a part at a
// time. Exponents are in base 2.
namespace fastrpe {
namespace linear {
namespace causal {
namespace {

// Segments ------------------------------------------------------------------------------------------------------------

// The sums over a segment's keys that later segments take, or over its queries, for earlier ones.
template <int M, bool Keys>
__global__ void __launch_bounds__(Layout<M>::threads, Layout<M>::blocks) sum_kernel(const Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Layout<M>;
  extern __shared__ __align__(1024) uint4 memory[];
  const Thread at;
  uint4 *omega = memory + at.group * slab, *stages = memory + Of::matrix;  // rows and values of each
  float* rows = reinterpret_cast<float*>(stages + 4 * slab);               // lse and delta of each
  float* bias = rows + 4 * tile;

  if (blockIdx.x % args.segments == (Keys ? args.segments - 1 : 0)) {
    return;
  }
  Heads* heads = reinterpret_cast<Heads*>(bias + tile);
  const Place place(args, Keys, heads);
  const auto start = [&](int i_tile) {
    if (i_tile < place.end) {
      const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
      const bool* mask = Keys ? heads->mask : nullptr;
      uint4* to = stages + i_tile % 2 * 2 * slab;
      fetch<Of::threads>(Keys ? heads->k : heads->q, Keys ? args.k.l : args.q.l, first, count, to, mask);
      fetch<Of::threads>(Keys ? heads->v : heads->dout, Keys ? args.v.l : args.dout.l, first, count, to + slab, mask);
      if constexpr (!Keys) {
        fetch_rows(args, heads->rows + first, count, rows + i_tile % 2 * 2 * tile);
      }
    }
    copies_end();
  };
  fill_projection<T, M, Of::threads>(args.projection, place.i_k, memory);
  let_next_begin();
  wait_for_previous();  // which finds lse and delta
  start(place.begin);

  const float exponent = args.scale * log2e, square = args.norm * 0.5f * log2e * args.scale * args.scale;
  State state;
  state.load<M>(at, {}, 0);
  for (int i_tile = place.begin; i_tile < place.end; ++i_tile) {
    const uint4 *tile_x = stages + i_tile % 2 * 2 * slab, *tile_y = tile_x + slab;
    const float *lse = rows + i_tile % 2 * 2 * tile, *deltas = lse + tile;
    const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
    copies_wait<0>();
    copies_visible();
    __syncthreads();  // this tile is there, and everyone has left the one before
    start(i_tile + 1);
    float s[values];
    products_begin();
    project(s, omega, tile_x);
    products_end();
    if constexpr (Keys) {
      fill_key_bias<Of::threads>(tile_x, count, heads->mask, first, square, bias);
    } else {
      fill_query_bias(lse, count, bias);
    }
    __syncthreads();  // bias is there
    products_wait<0>(s);
    float top[2] = {state.tops[0], state.tops[1]};
    make_exponents(s, exponent, bias, top);
    state.move(top);
    Operand a;
    make_weights<T>(a, s, top);
    products_begin();
    add_product(state.sums, a, tile_y, true);
    products_end();
    state.add(at, a, Keys ? nullptr : deltas);
    products_wait<0>(state.sums);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t feature = static_cast<int64_t>(blockIdx.x) * M + at.group * 64 + at.row(r);
    const float weight = sum_of_four(state.weights[r]);
    if (at.t == 0) {
      args.sums.weights[feature] = weight;
      args.sums.tops[feature] = state.tops[r];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      *reinterpret_cast<float2*>(args.sums.values + feature * width + 8 * j + 2 * at.t) = {
          state.sums[4 * j + 2 * r], state.sums[4 * j + 2 * r + 1]};
    }
  }
#endif
}

// Of every segment the sums of all before it, or behind it; 16 threads for each of `features` of all heads.
__global__ void __launch_bounds__(128)
    scan_kernel(const Sums from, const Sums to, int64_t features, int segments, int M, bool backwards) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x, feature = i / 16;
  if (feature >= features) {
    return;
  }
  let_next_begin();
  wait_for_previous();
  const int u = static_cast<int>(i % 16);
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  float weight = 0.0f, top = empty;
#pragma unroll 4
  for (int n = 0; n < segments; ++n) {
    const int segment = backwards ? segments - 1 - n : n;
    const int64_t row = (feature / M * segments + segment) * M + feature % M;
    reinterpret_cast<float4*>(to.values)[row * 16 + u] = sum;
    if (u == 0) {
      to.weights[row] = weight;
      to.tops[row] = top;
    }
    if (n + 1 < segments) {
      const float4 x = reinterpret_cast<const float4*>(from.values)[row * 16 + u];
      const float other = from.tops[row], all = fmaxf(top, other);
      const float a = exp2_approximate(top - all), b = exp2_approximate(other - all);
      sum = {sum.x * a + x.x * b, sum.y * a + x.y * b, sum.z * a + x.z * b, sum.w * a + x.w * b};
      weight = weight * a + from.weights[row] * b;
      top = all;
    }
  }
}

// dk or dv of key heads from those of their query heads, 4 numbers to a thread of `count`; a head has `size` such.
__global__ void __launch_bounds__(256)
    add_groups_kernel(const float4* from, uint2* to, int64_t count, int groups, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) {
    return;
  }
  let_next_begin();
  wait_for_previous();
  const float4* x = from + i / size * groups * size + i % size;
  float4 sum = x[0];
  for (int n = 1; n < groups; ++n) {
    const float4 y = x[n * size];
    sum = {sum.x + y.x, sum.y + y.y, sum.z + y.z, sum.w + y.w};
  }
  to[i] = {pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w)};
}

struct SlotArgs {
  const float *queries, *keys;  // (outer, sets, inner, M (D + 1))
  float *domega, *dbias;        // (sets, M, D), (sets, M) or null
  int64_t outer, inner;
  int sets, M;
};

// Adds the slots of each set of heads, 64 numbers to a block.
__global__ void __launch_bounds__(256) add_slots_kernel(const SlotArgs args) {
  __shared__ float4 sums[16][16];
  const int x = threadIdx.x % 16, lane = threadIdx.x / 16, chunks = args.M / 64 * (width + 1);
  const int set = blockIdx.x / chunks, i = blockIdx.x % chunks * 16 + x, size = args.M * (width + 1) / 4;
  let_next_begin();
  wait_for_previous();
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto add = [&sum](const float4& y) { sum = {sum.x + y.x, sum.y + y.y, sum.z + y.z, sum.w + y.w}; };
#pragma unroll 4
  for (int64_t n = lane; n < args.outer * args.inner; n += 16) {
    const int64_t slot = (n / args.inner * args.sets + set) * args.inner + n % args.inner;
    add(reinterpret_cast<const float4*>(args.queries)[slot * size + i]);
    add(reinterpret_cast<const float4*>(args.keys)[slot * size + i]);
  }
  sums[lane][x] = sum;
  __syncthreads();
  if (lane == 0) {
#pragma unroll
    for (int n = 1; n < 16; ++n) {
      add(sums[n][x]);
    }
    const int weights = args.M * width / 4;
    if (i < weights) {
      reinterpret_cast<float4*>(args.domega)[static_cast<int64_t>(set) * weights + i] = sum;
    } else if (args.dbias != nullptr) {
      reinterpret_cast<float4*>(args.dbias)[set * (args.M / 4) + i - weights] = sum;
    }
  }
}

// Launches ------------------------------------------------------------------------------------------------------------

// Tiles of a segment, for the least time; one to a head costs no sums beforehand.
int share_of(int64_t tiles, int64_t heads, int64_t resident) {
  int64_t best = tiles, least = INT64_MAX;
  const int64_t most = std::min(tiles, std::max<int64_t>(1, 2 * resident / heads));
  for (int64_t n = 1; n <= most; ++n) {
    constexpr int64_t start = 3;  // that a block's beginning takes, in tiles
    const int64_t share = (tiles + n - 1) / n;
    const int64_t time = (heads * n + resident - 1) / resident * (share + start) * (n > 1 ? 5 : 4);
    if (time < least) {
      least = time;
      best = share;
    }
  }
  return static_cast<int>(best);
}

}  // namespace
}  // namespace causal

using namespace causal;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_causal_bwd_cuda(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega,
    int64_t kind, double scale, const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, bool need_omega) {
  const char* op = "linear_attention_bwd";
  constexpr int64_t positive = 0, exp = 5;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && dout.dim() == 4, op,
                  ": q, k, v and dout must have 4 dimensions");
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), Hk = k.size(1);
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, op, ": q must have dtype bfloat16 where attention is causal");
  STD_TORCH_CHECK(kind == exp || (kind == positive && omega), op, ": on a GPU features must be positive or exp");
  for (const auto& [argument, x] : {std::pair{"k", &k}, {"v", &v}, {"dout", &dout}}) {
    check_like(op, argument, *x, dtype, q);
  }
  STD_TORCH_CHECK(q.size(3) == width && k.size(3) == width && v.size(3) == width && dout.size(3) == width, op,
                  ": D and V must be 64");
  STD_TORCH_CHECK(Hk > 0 ? H % Hk == 0 : H == 0, op, ": H must be a multiple of Hk");
  STD_TORCH_CHECK(k.size(0) == B && k.size(2) == L && v.size(0) == B && v.size(1) == Hk && v.size(2) == L &&
                      dout.size(0) == B && dout.size(1) == H && dout.size(2) == L,
                  op, ": shapes of q, k, v and dout must agree");
  const Projection projection = projection_of(op, omega, q, Hk);
  const int64_t M = projection.features;
  STD_TORCH_CHECK(M <= 128, op, ": causal omega must have 64 or 128 rows");
  const bool per_head = omega && omega->dim() == 3;
  if (bias) {
    check_like(op, "bias", *bias, ScalarType::Float, q);
    STD_TORCH_CHECK(bias->is_contiguous() && bias->numel() == (per_head ? Hk * M : M), op,
                    ": bias must be contiguous, of omega's shape without D");
  }
  if (mask) {
    check_like(op, "mask", *mask, ScalarType::Bool, q);
    STD_TORCH_CHECK(mask->is_contiguous() && mask->numel() == B * L, op, ": mask must be contiguous, of shape (B, S)");
  }
  const Device gpu = device(q.get_device_index());
  STD_TORCH_CHECK(gpu.capability == 9, op, ": q must be on a GPU of compute capability 9");

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  const auto new_floats = [&](int64_t count) { return new_empty(q, {count}, ScalarType::Float); };
  const auto floats = [](const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); };
  const auto like = [&](const std::optional<Tensor>& x) {
    return need_omega && x ? new_empty(q, std::vector<int64_t>(x->sizes().begin(), x->sizes().end()), ScalarType::Float)
                           : new_empty(q, {0}, ScalarType::Float);
  };
  Tensor dq = new_empty(q, {B, H, L, width}, dtype), dk = new_empty(q, {B, Hk, L, width}, dtype),
         dv = new_empty(q, {B, Hk, L, width}, dtype), domega = like(omega), dbias = like(bias);
  const int64_t tiles = ceil_div(L, tile), heads = B * H, sets = per_head ? Hk : 1;
  bool overlaps = false;  // the kernel before is one of these, and may end while the next begins
  const auto run_blocks = [&](auto kernel, int64_t blocks, int threads, size_t bytes, auto... arguments) {
    STD_TORCH_CHECK(blocks <= INT32_MAX, op, ": B, H and L must be smaller");
    if (blocks == 0) {
      return;
    }
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    launch(kernel, dim3(static_cast<uint32_t>(blocks)), threads, bytes, stream, overlaps, arguments...);
    overlaps = true;
  };
  const auto run = [&](auto features, auto with_omega) {
    constexpr int F = features;
    constexpr bool Omega = with_omega;
    using Of = Layout<F>;
    Args args{};
    args.q = rows_of<T>(op, q);
    args.k = rows_of<T>(op, k);
    args.v = rows_of<T>(op, v);
    args.dout = rows_of<T>(op, dout);
    args.projection = projection;
    args.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    args.bias_h = per_head ? F : 0;
    args.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    args.dq = static_cast<T*>(dq.mutable_data_ptr());
    args.dk = static_cast<T*>(dk.mutable_data_ptr());
    args.dv = static_cast<T*>(dv.mutable_data_ptr());
    args.length = static_cast<int>(L);
    args.heads = static_cast<int>(H);
    args.groups = Hk > 0 ? static_cast<int>(H / Hk) : 1;
    args.tiles = static_cast<int>(tiles);
    args.scale = static_cast<float>(scale);
    args.norm = kind == positive ? 1.0f : 0.0f;
    args.share = heads > 0 && tiles > 0 ? share_of(tiles, heads, gpu.multiprocessors * (Omega ? 1 : 2)) : 1;
    args.segments = ceil_div(tiles, args.share);
    const int64_t blocks = heads * args.segments;
    const Tensor rows = new_floats(2 * heads * L);
    args.lse = floats(rows);
    args.delta = args.lse + heads * L;
    // Sums of segments, and of all before them; those of keys need not be kept longer than theirs.
    const int64_t parts = args.segments > 1 ? blocks * F : 0;
    const Tensor sums = new_floats(2 * parts * (width + 2));
    const auto sums_at = [&](float* at) { return Sums{at, at + parts * width, at + parts * (width + 1)}; };
    const Sums own_sums = sums_at(floats(sums)), others = sums_at(floats(sums) + parts * (width + 2));
    const auto add_segments = [&](auto kernel, int64_t heads, bool backwards) {
      if (parts > 0) {
        args.sums = own_sums;
        run_blocks(kernel, heads * args.segments, Of::threads, Of::sum_bytes, args);
        run_blocks(scan_kernel, ceil_div(heads * F * 16, 128), 128, 0, own_sums, others, heads * F, args.segments, F,
                   backwards);
        args.sums = others;
      }
    };
    const int64_t slot = F * (width + 1);
    const Tensor slots = new_floats(Omega ? 2 * blocks * slot : 0);
    const Tensor of_groups = new_floats(args.groups > 1 ? 2 * heads * L * width : 0);

    args.slots = floats(slots);
    add_segments(sum_kernel<F, true>, B * Hk, false);
    run_blocks(query_walk_kernel<F, Omega>, blocks, Of::threads, Of::query_bytes, args);
    add_segments(sum_kernel<F, false>, heads, true);
    args.slots += Omega ? blocks * slot : 0;
    if (args.groups > 1) {
      args.group_dk = floats(of_groups);
      args.group_dv = args.group_dk + heads * L * width;
    }
    run_blocks(key_walk_kernel<F, Omega>, blocks, Of::threads, Of::key_bytes, args);
    if (args.groups > 1) {
      const int64_t size = L * width / 4, count = B * Hk * size;
      for (const auto& [from, to] : {std::pair{args.group_dk, args.dk}, {args.group_dv, args.dv}}) {
        run_blocks(add_groups_kernel, (count + 255) / 256, 256, 0, reinterpret_cast<const float4*>(from),
                   reinterpret_cast<uint2*>(to), count, args.groups, size);
      }
    }
    if (Omega && sets > 0) {
      const int64_t outer = per_head ? B : 1;
      const SlotArgs to_add{floats(slots),
                            floats(slots) + blocks * slot,
                            floats(domega),
                            bias ? floats(dbias) : nullptr,
                            outer,
                            blocks / (outer > 0 ? outer * sets : 1),
                            static_cast<int>(sets),
                            F};
      run_blocks(add_slots_kernel, sets * (F / 64) * (width + 1), 256, 0, to_add);
    }
  };
  const auto with_features = [&](auto with_omega) {
    M == 64 ? run(std::integral_constant<int, 64>{}, with_omega) : run(std::integral_constant<int, 128>{}, with_omega);
  };
  need_omega ? with_features(std::true_type{}) : with_features(std::false_type{});
  const Tensor nothing = new_empty(q, {0}, dtype);
  return {dq, dk, dv, domega, dbias, nothing, nothing};
}

}  // namespace linear
}  // namespace fastrpe
