#pragma once

#include <optional>
#include <tuple>

#include "../common/checks.h"

namespace fastrpe {
namespace linear {

// The output, and the state behind the last key; N is B, or the number of packed sequences. `kind` counts as KINDS in
// fastrpe/ops/linear/op.py. All but q, k and v are contiguous, and in float64 for float64, else float32.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention_cpu(const Tensor& q,                     // (B, H, L, D)
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

// Gradients of q, k, v, omega, bias, kv and z; an empty tensor where there is nothing or no need.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_bwd_cpu(
    const Tensor& dout,                // (B, H, L, V)
    const std::optional<Tensor>& dkv,  // (N, Hk, F, V)
    const std::optional<Tensor>& dz,   // (N, Hk, F)
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega, int64_t kind, bool causal,
    double scale, const std::optional<Tensor>& bias, double eps, bool normalize, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& kv, const std::optional<Tensor>& z,
    const std::optional<Tensor>& log_scale, const Tensor& last_kv, const Tensor& last_z, const Tensor& last_log_scale,
    bool need_omega);

}  // namespace linear
}  // namespace fastrpe
