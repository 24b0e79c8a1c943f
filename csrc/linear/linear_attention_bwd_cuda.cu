#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "linear_attention_bwd_heads.cuh"
#include "linear_attention_cuda.h"

// Gradients of bidirectional, normalised attention by exponential features. It is softmax attention twice: feature f
// has the mean U_f of the values over keys, with weights a_jf = phi_f(k_j) / sum_j phi_f(k_j), and a query has the mean
// of U over features, with weights w_if. Backwards as forwards, both have weights of at most 1, whatever the exponents:
//
//   queries   dS = dout U^T,  delta = sum_f w dS,  ds = w (dS - delta),  dq = scale ds W
//   features  dU_f = sum_i w_if dout_i,  r_f = sum_i ds_if,  y_f = U_f dU_f - r_f
//   keys      dv = a dU,  ds = a (v dU^T - y),  dk = scale ds W - scale^2 k sum_f ds
//
// U and dU are rounded to 16 bits, which must not show where differences are small. Queries do not see a vector common
// to all U_f: it is taken off before. A key with nearly all of a feature's weight has v = U_f, and its v dU_f - U_f
// dU_f is to cancel: y_f takes the rounded dU_f, and r_f the rounded U_f. Other roundings are relative to differences;
// where shared memory has room, queries take U as the sum of two numbers all the same (alone, for short heads).
//
// One kernel takes queries, another keys, each in one pass over memory. Tiles of a head side by side are a unit, which
// leaves its part of dU and r in a slot of its own. Where dW = scale (ds^T q + ds^T k) is wanted too, a block takes
// several units whose heads have the same projection, and leaves the sum over them in a slot. Slots are added in order,
// so the result is deterministic. With 256 features the registers do not hold all of that, and dW takes another pass.
//
// Of short heads U and dU are more than the rows. A third kernel takes a key head at a time, its queries and then its
// keys, and dU stays in shared memory; of heads of one tile it makes U again, so that they need no state.
namespace fastrpe {
namespace linear {
namespace bidirectional {
namespace {

// Slots of dW, (outer, sets, inner, M, D), and of r for the bias, (outer, sets, inner, count, step).
struct OmegaSlots {
  const float* data;
  int64_t outer, inner;

  // Calls f with each lanes-th slot of a set, from slot `lane` on.
  template <typename F>
  __device__ __forceinline__ void each(int set, int sets, int lane, int lanes, F&& f) const {
#pragma unroll 4
    for (int64_t n = lane; n < outer * inner; n += lanes) {
      f((n / inner * sets + set) * inner + n % inner);
    }
  }
};

template <int M>
struct OmegaArgs {
  OmegaSlots queries, keys, states;
  int count, step;        // slots of a key head, and numbers from one to the next
  float *domega, *dbias;  // (sets, M, D), (sets, M) or null
};

// Adds the slots of a set of heads; a block for each feature. Exponents of queries and keys have the same bias, each
// with the gradient r_f.
template <int M>
__global__ void __launch_bounds__(256) add_omega_kernel(const OmegaArgs<M> args) {
  constexpr int columns = width / 4, lanes = 256 / columns;
  __shared__ float4 sums[lanes][columns];
  __shared__ float bias_sums[lanes];
  const int x = threadIdx.x % columns, lane = threadIdx.x / columns;
  const int f = blockIdx.x % M, set = blockIdx.x / M, sets = gridDim.x / M;
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto add = [&sum](const float4& y) { sum = {sum.x + y.x, sum.y + y.y, sum.z + y.z, sum.w + y.w}; };
  args.queries.each(set, sets, lane, lanes, [&](int64_t slot) {
    add(reinterpret_cast<const float4*>(args.queries.data)[(slot * M + f) * columns + x]);
  });
  args.keys.each(set, sets, lane, lanes, [&](int64_t slot) {
    add(reinterpret_cast<const float4*>(args.keys.data)[(slot * M + f) * columns + x]);
  });
  sums[lane][x] = sum;
  if (args.dbias != nullptr && x == 0) {
    float bias = 0.0f;
    args.states.each(set, sets, lane, lanes, [&](int64_t head) {
      for (int n = 0; n < args.count; ++n) {
        bias += args.states.data[(head * args.count + n) * args.step + f];
      }
    });
    bias_sums[lane] = bias;
  }
  __syncthreads();
  if (lane == 0) {
#pragma unroll
    for (int i = 1; i < lanes; ++i) {
      add(sums[i][x]);
    }
    reinterpret_cast<float4*>(args.domega)[blockIdx.x * columns + x] = sum;
  }
  if (args.dbias != nullptr && threadIdx.x == 0) {
    float bias = 0.0f;
#pragma unroll
    for (int i = 0; i < lanes; ++i) {
      bias += bias_sums[i];
    }
    args.dbias[blockIdx.x] = 2.0f * bias;
  }
}

// Tiles of `heads` in shares of so many to blocks of which `resident` run at a time: how long, in tiles, with `start`
// for a block's beginning.
int64_t time_of(int64_t share, int64_t tiles, int64_t heads, int64_t resident, int64_t start) {
  return ceil_div(heads * ceil_div(tiles, share), resident) * (share + start);
}

// Tiles of a head that a block takes, for the least time.
int share_of(int64_t tiles, int64_t heads, int64_t resident, int64_t start) {
  int64_t best = tiles, least = INT64_MAX;
  const int64_t most = std::min(tiles, std::max<int64_t>(1, 2 * resident / heads));
  for (int64_t n = 1; n <= most; ++n) {
    const int64_t share = (tiles + n - 1) / n, time = (heads * n + resident - 1) / resident * (share + start);
    if (time < least) {
      least = time;
      best = share;
    }
  }
  return static_cast<int>(best);
}

}  // namespace
}  // namespace bidirectional

using namespace bidirectional;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_bwd_cuda(
    const Tensor& dout, const std::optional<Tensor>& dkv, const std::optional<Tensor>& dz, const Tensor& q,
    const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega, int64_t kind, bool causal, double scale,
    const std::optional<Tensor>& bias, double eps, bool normalize, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& kv, const std::optional<Tensor>& z,
    const std::optional<Tensor>& log_scale, const Tensor& last_kv, const Tensor& last_z, const Tensor& last_log_scale,
    bool need_omega) {
  const char* op = "linear_attention_bwd";
  constexpr int64_t positive = 0, exp = 5;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && dout.dim() == 4, op,
                  ": q, k, v and dout must have 4 dimensions");
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), Hk = k.size(1), S = k.size(2);
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                  ": q must have dtype float16 or bfloat16");
  STD_TORCH_CHECK((kind == exp || (kind == positive && omega)) && eps == 0 && normalize && !cu_seqlens && !kv && !z &&
                      !log_scale && !dkv && !dz,
                  op, ": on a GPU attention must be normalised, by positive features or exp, and without a state");
  need_omega &= omega.has_value();
  if (causal) {
    return linear_attention_causal_bwd_cuda(dout, q, k, v, omega, kind, scale, bias, mask, need_omega);
  }
  for (const auto& [argument, x] : {std::pair{"k", &k}, {"v", &v}, {"dout", &dout}}) {
    check_like(op, argument, *x, dtype, q);
  }
  STD_TORCH_CHECK(q.size(3) == width && k.size(3) == width && v.size(3) == width && dout.size(3) == width, op,
                  ": D and V must be 64");
  STD_TORCH_CHECK(Hk > 0 ? H % Hk == 0 : H == 0, op, ": H must be a multiple of Hk");
  STD_TORCH_CHECK(k.size(0) == B && v.size(0) == B && v.size(1) == Hk && v.size(2) == S && dout.size(0) == B &&
                      dout.size(1) == H && dout.size(2) == L,
                  op, ": shapes of q, k, v and dout must agree");
  const Projection projection = projection_of(op, omega, q, Hk);
  const int64_t M = projection.features;
  const bool per_head = omega && omega->dim() == 3;
  const auto check_floats = [&](const char* argument, const Tensor& x, int64_t count) {
    check_like(op, argument, x, ScalarType::Float, q);
    STD_TORCH_CHECK(x.is_contiguous() && x.numel() == count, op, ": ", argument, " must be contiguous, of ", count,
                    " numbers");
  };
  // Heads of one tile need no state.
  const bool one_tile = L > 0 && S > 0 && L <= tile && S <= tile && M <= 128,
             has_state = !one_tile || last_z.numel() > 0;
  check_floats("last_kv", last_kv, has_state ? B * Hk * M * width : 0);
  check_floats("last_z", last_z, has_state ? B * Hk * M : 0);
  check_floats("last_log_scale", last_log_scale, has_state ? B * Hk * M : 0);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(last_kv.const_data_ptr()) % 16 == 0, op,
                  ": last_kv must be aligned to 16 bytes");
  if (bias) {
    check_floats("bias", *bias, per_head ? Hk * M : M);
  }
  if (mask) {
    check_like(op, "mask", *mask, ScalarType::Bool, q);
    STD_TORCH_CHECK(mask->is_contiguous() && mask->numel() == B * S, op, ": mask must be contiguous, of shape (B, S)");
  }
  const Device gpu = device(q.get_device_index());
  STD_TORCH_CHECK(gpu.capability == 9, op, ": q must be on a GPU of compute capability 9");

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor dq = new_empty(q, {B, H, L, width}, dtype), dk = new_empty(q, {B, Hk, S, width}, dtype),
         dv = new_empty(q, {B, Hk, S, width}, dtype);
  const Tensor empty = new_empty(q, {0}, dtype);
  const auto like = [&](const std::optional<Tensor>& x) {
    return need_omega && x ? new_empty(q, std::vector<int64_t>(x->sizes().begin(), x->sizes().end()), ScalarType::Float)
                           : empty;
  };
  Tensor domega = like(omega), dbias = like(bias);
  const int64_t multiprocessors = gpu.multiprocessors;
  const int64_t query_tiles = ceil_div(L, tile), key_tiles = ceil_div(S, tile);
  const cudaStream_t stream = current_stream(q);
  const auto run = [&](auto zero, auto features) {
    using T = decltype(zero);
    constexpr int M = features;
    using Of = Layout<M>;
    constexpr int size = M * (width + 1);
    Args<T> args{};
    args.projection = projection;
    args.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    args.bias_h = per_head ? M : 0;
    args.kv = static_cast<const float*>(last_kv.const_data_ptr());
    args.z = static_cast<const float*>(last_z.const_data_ptr());
    args.log_scale = static_cast<const float*>(last_log_scale.const_data_ptr());
    args.groups = Hk > 0 ? static_cast<int>(H / Hk) : 1;
    args.scale = static_cast<float>(scale);
    args.norm = kind == positive ? 1.0f : 0.0f;
    bool overlaps = false;  // the kernel before is one of these, and may end while the next begins
    const auto run_blocks = [&](auto kernel, int64_t blocks, int chunks, int threads, size_t bytes, auto... arguments) {
      STD_TORCH_CHECK(blocks <= INT32_MAX, op, ": B and H must be smaller");
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
      launch(kernel, dim3(static_cast<uint32_t>(blocks), chunks), threads, bytes, stream, overlaps, arguments...);
    };
    Args<T> queries = args, keys = args;
    queries.x = rows_of<T>(op, q);
    queries.y = rows_of<T>(op, dout);
    queries.dx = static_cast<T*>(dq.mutable_data_ptr());
    queries.length = L;
    queries.heads = static_cast<int>(H);
    keys.x = rows_of<T>(op, k);
    keys.y = rows_of<T>(op, v);
    keys.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    keys.dx = static_cast<T*>(dk.mutable_data_ptr());
    keys.dy = static_cast<T*>(dv.mutable_data_ptr());
    keys.length = S;
    keys.heads = static_cast<int>(Hk);
    // Blocks walk over units of each set of heads that share a projection.
    const int64_t sets = per_head ? Hk : 1, outer = per_head ? B : 1;
    const auto walk = [&](Args<T>& args, int64_t resident) {
      const int64_t units = B * args.heads * args.blocks / sets;
      STD_TORCH_CHECK(units * sets <= INT32_MAX, op, ": B and H must be smaller");
      args.sets = static_cast<int>(sets);
      args.inner = static_cast<int>(units / outer);
      args.units = static_cast<int>(units);
      args.taken = share_of(units, sets, resident, 1);
      args.walkers = ceil_div(units, args.taken);
    };
    // For dW, with a slot for each.
    Tensor parts = empty, query_omega = empty, key_omega = empty;
    OmegaArgs<M> sums{};
    const auto start_slots = [&](Args<T>& args, Tensor& slots) {
      slots = new_empty(q, {sets * args.walkers, M, width}, ScalarType::Float);
      args.omega_parts = static_cast<float*>(slots.mutable_data_ptr());
      return OmegaSlots{args.omega_parts, 1, args.walkers};
    };
    const int64_t query_places = multiprocessors * Of::query_blocks, key_places = multiprocessors * Of::key_blocks;
    const auto add_slots = [&](const float* r, int64_t count, int step) {
      if (bias && count > 0) {
        sums.states = {r, outer, B * Hk / (outer * sets)};
        sums.count = static_cast<int>(count);
        sums.step = step;
      }
      sums.domega = static_cast<float*>(domega.mutable_data_ptr());
      sums.dbias = bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
      overlaps = false;
      run_blocks(add_omega_kernel<M>, sets * M, 1, 256, 0, sums);
    };
    const auto try_whole = [&](auto with_omega, auto is_fresh, auto is_single) {
      constexpr bool omega = with_omega, fresh = is_fresh, single = is_single;
      using Whole = HeadLayout<M, omega, fresh, single>;
      const int64_t places = multiprocessors * Whole::blocks;
      keys.share = static_cast<int>(key_tiles);
      keys.blocks = 1;
      walk(keys, places);
      // How long it takes, in tiles: a block's beginning is worth 3 and a head 1, two warpgroups need two thirds for
      // each. Apart, as share_of has it; with dW about the same.
      const int64_t whole = ceil_div(sets * keys.walkers, places) *
                            (keys.taken * (keys.groups * query_tiles + key_tiles + 1) + 3) * 2 / (1 + Whole::groups);
      const int64_t apart =
          time_of(share_of(query_tiles, B * H, query_places, 4), query_tiles, B * H, query_places, 4) +
          time_of(share_of(key_tiles, B * Hk, key_places, 2), key_tiles, B * Hk, key_places, 2);
      if (has_state && whole > apart) {
        return false;
      }
      if constexpr (omega) {
        sums.keys = start_slots(keys, key_omega);
        if (bias) {
          parts = new_empty(q, {B * Hk, M}, ScalarType::Float);
          keys.parts = static_cast<float*>(parts.mutable_data_ptr());
        }
      }
      run_blocks(head_gradient_kernel<T, M, omega, fresh, single>, sets * keys.walkers, 1, Whole::threads, Whole::bytes,
                 queries, keys);
      if constexpr (omega) {
        add_slots(keys.parts, 1, M);
      }
      return true;
    };
    if constexpr (M <= 128) {
      const auto try_tiles = [&](auto with_omega) {
        // With float16's scaling there are too few registers.
        if constexpr (with_omega && M > 64 && std::is_same_v<T, BFloat16>) {
          if (one_tile && H == Hk) {
            return try_whole(with_omega, std::true_type{}, std::true_type{});
          }
        }
        return one_tile ? try_whole(with_omega, std::true_type{}, std::false_type{})
                        : try_whole(with_omega, std::false_type{}, std::false_type{});
      };
      if (B * H * query_tiles > 0 && B * Hk * key_tiles > 0 &&
          (need_omega ? try_tiles(std::true_type{}) : try_tiles(std::false_type{}))) {
        return;
      }
    }
    int64_t count = 0;  // slots of a key head
    if (B * H * query_tiles > 0) {
      using Walk = OmegaLayout<M>;
      const bool together = need_omega && Walk::all;
      queries.share = share_of(query_tiles, B * H, together ? multiprocessors * Walk::blocks : query_places, 4);
      queries.blocks = ceil_div(query_tiles, queries.share);
      count = static_cast<int64_t>(queries.groups) * queries.blocks;
      const int64_t slots = B * H * queries.blocks, more = count > (need_omega ? 1 : 2) ? B * Hk : 0;
      parts = new_empty(q, {slots + more, size}, ScalarType::Float);
      queries.parts = static_cast<float*>(parts.mutable_data_ptr());
      if (need_omega) {
        walk(queries, multiprocessors * Walk::blocks);
        sums.queries = start_slots(queries, query_omega);
        run_blocks(query_omega_kernel<T, M>, sets * queries.walkers, 1, Walk::threads, Walk::bytes, queries);
      }
      if (!together) {
        run_blocks(query_gradient_kernel<T, M>, B * H * queries.blocks, 1, Of::query_threads, Of::query_bytes, queries);
      }
      overlaps = true;
      if (more > 0) {
        const auto* from = reinterpret_cast<const float4*>(queries.parts);
        queries.parts += slots * size;
        run_blocks(add_parts_kernel, ceil_div(more * (size / 4), 128), 1, 128, 0, from,
                   reinterpret_cast<float4*>(queries.parts), more, static_cast<int>(count), size / 4);
        count = 1;
      }
    }
    if (B * Hk * key_tiles > 0) {
      constexpr int chunks = M / Of::features;
      const bool together = need_omega && chunks == 1;
      keys.share = share_of(key_tiles, B * Hk, together ? multiprocessors * Of::omega_blocks : key_places, 2);
      keys.blocks = ceil_div(key_tiles, keys.share);
      keys.parts = queries.parts;
      keys.count = static_cast<int>(count);
      if (!together) {
        run_blocks(key_gradient_kernel<T, M>, B * Hk * keys.blocks, 1, Of::key_threads, Of::key_bytes, keys);
        overlaps = false;
      }
      if (need_omega) {
        walk(keys, multiprocessors * Of::omega_blocks / chunks);
        sums.keys = start_slots(keys, key_omega);
        run_blocks(key_omega_kernel<T, M>, sets * keys.walkers, chunks, Of::key_threads, Of::omega_bytes, keys);
      }
    }
    if (need_omega && sets > 0) {
      add_slots(queries.parts + M * width, count, size);
    }
  };
  const auto with_features = [&](auto zero) {
    switch (M) {
      case 64:
        return run(zero, std::integral_constant<int, 64>{});
      case 128:
        return run(zero, std::integral_constant<int, 128>{});
      default:
        return run(zero, std::integral_constant<int, 256>{});
    }
  };
  dtype == ScalarType::BFloat16 ? with_features(BFloat16{}) : with_features(Half{});
  return {dq, dk, dv, domega, dbias, empty, empty};
}

}  // namespace linear
}  // namespace fastrpe
