#pragma once

#include <optional>
#include <tuple>

#include "../common/checks.h"

namespace fastrpe {
namespace linear {

// On Hopper's tensor cores: normalised attention of exponential features (positive, or exp) without
// eps or packing, in 16 bits, when causal in bfloat16, with D = V = 64 and 64, 128 or 256 features. `kind` counts as
// KINDS in fastrpe/ops/linear/op.py. Rows of q, k and v are aligned to 16 bytes; omega, in their dtype or float32, is
// rounded to it; the rest is contiguous and float32.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention_cuda(const Tensor& q,                     // (B, H, L, D)
                                                                 const Tensor& k,                     // (B, Hk, S, D)
                                                                 const Tensor& v,                     // (B, Hk, S, V)
                                                                 const std::optional<Tensor>& omega,  // (.., M, D)
                                                                 int64_t kind, bool causal, double scale,
                                                                 const std::optional<Tensor>& bias,  // (.., M)
                                                                 double eps, bool normalize,
                                                                 const std::optional<Tensor>& mask,        // (B, S)
                                                                 const std::optional<Tensor>& cu_seqlens,  // (N + 1,)
                                                                 const std::optional<Tensor>& kv,  // (N, Hk, F, V)
                                                                 const std::optional<Tensor>& z,   // (N, Hk, F)
                                                                 const std::optional<Tensor>& log_scale,  // as z
                                                                 bool need_state);

// Gradients of q, k, v, omega, bias, kv and z; an empty tensor where there is nothing or no need. Of the same cases,
// bidirectional, from the forward's state, which has no gradient of its own; those of omega and bias are float32. With
// up to 64 queries and keys and up to 128 features the state may be empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_bwd_cuda(
    const Tensor& dout,                // (B, H, L, V)
    const std::optional<Tensor>& dkv,  // (N, Hk, F, V)
    const std::optional<Tensor>& dz,   // (N, Hk, F)
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega, int64_t kind, bool causal,
    double scale, const std::optional<Tensor>& bias, double eps, bool normalize, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& kv, const std::optional<Tensor>& z,
    const std::optional<Tensor>& log_scale, const Tensor& last_kv, const Tensor& last_z, const Tensor& last_log_scale,
    bool need_omega);

// The same of causal attention, in bfloat16 and with 64 or 128 features; the state behind the last key has no gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_causal_bwd_cuda(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega,
    int64_t kind, double scale, const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, bool need_omega);

}  // namespace linear
}  // namespace fastrpe
