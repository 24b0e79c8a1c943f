#pragma once

#include <tuple>

#include "../common/checks.h"

namespace fastrpe {
namespace rotary {

std::tuple<Tensor, Tensor> rotate_cuda(const Tensor& q,          // (B, H, L, D)
                                       const Tensor& k,          // (B, Hk, L, D)
                                       const Tensor& positions,  // (L - prefix, C) or (B, L - prefix, C)
                                       const Tensor& freqs,      // (C, R) or (Hk, C, R)
                                       bool interleaved, bool inverse, double factor, int64_t prefix);

// Gradients of q, k, positions and freqs; an empty tensor where not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> rotate_bwd_cuda(const Tensor& dyq,        // (B, H, L, D)
                                                           const Tensor& dyk,        // (B, Hk, L, D)
                                                           const Tensor& q,          // (B, H, L, D)
                                                           const Tensor& k,          // (B, Hk, L, D)
                                                           const Tensor& positions,  // (L - prefix, C) or (B, ...)
                                                           const Tensor& freqs,      // (C, R) or (Hk, C, R)
                                                           bool interleaved, bool inverse, double factor,
                                                           int64_t prefix, bool need_positions, bool need_freqs);

std::tuple<Tensor, Tensor> rotate_cos_sin_cuda(const Tensor& q,    // (B, H, L, D)
                                               const Tensor& k,    // (B, Hk, L, D)
                                               const Tensor& cos,  // (L - prefix, R) or (B, L - prefix, R)
                                               const Tensor& sin,  // as cos
                                               bool interleaved, bool inverse, int64_t prefix);

// The same with a basis, for 16-bit values and heads of 64 or 128.
std::tuple<Tensor, Tensor> rotate_basis_cuda(const Tensor& q,          // (B, H, L, D)
                                             const Tensor& k,          // (B, Hk, L, D)
                                             const Tensor& positions,  // (L - prefix, C) or (B, L - prefix, C)
                                             const Tensor& freqs,      // (C, D // 2) or (Hk, C, D // 2)
                                             const Tensor& basis,      // (D, D) or (Hk, D, D)
                                             bool interleaved, bool inverse, double factor, int64_t prefix);

// Gradients of q, k, basis and freqs, of the last two in float32; an empty tensor where not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> rotate_basis_bwd_cuda(
    const Tensor& dyq,        // (B, H, L, D)
    const Tensor& dyk,        // (B, Hk, L, D)
    const Tensor& q,          // (B, H, L, D)
    const Tensor& k,          // (B, Hk, L, D)
    const Tensor& positions,  // (L - prefix, C) or (B, ...)
    const Tensor& freqs,      // (C, D // 2) or (Hk, ...)
    const Tensor& basis,      // (D, D) or (Hk, D, D)
    bool interleaved, double factor, int64_t prefix, bool need_freqs, bool need_basis);

}  // namespace rotary
}  // namespace fastrpe
