#pragma once

#include <tuple>

#include "../common/checks.h"

namespace fastrpe {
namespace rotary {

std::tuple<Tensor, Tensor> rotate_cpu(const Tensor& q,          // (B, H, L, D)
                                      const Tensor& k,          // (B, Hk, L, D)
                                      const Tensor& positions,  // (L - prefix, C) or (B, L - prefix, C)
                                      const Tensor& freqs,      // (C, R) or (Hk, C, R)
                                      bool interleaved, bool inverse, double factor, int64_t prefix);

// Gradients of q, k, positions and freqs; an empty tensor where not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> rotate_bwd_cpu(const Tensor& dyq,        // (B, H, L, D)
                                                          const Tensor& dyk,        // (B, Hk, L, D)
                                                          const Tensor& q,          // (B, H, L, D)
                                                          const Tensor& k,          // (B, Hk, L, D)
                                                          const Tensor& positions,  // (L - prefix, C) or (B, ...)
                                                          const Tensor& freqs,      // (C, R) or (Hk, C, R)
                                                          bool interleaved, bool inverse, double factor, int64_t prefix,
                                                          bool need_positions, bool need_freqs);

std::tuple<Tensor, Tensor> rotate_cos_sin_cpu(const Tensor& q,    // (B, H, L, D)
                                              const Tensor& k,    // (B, Hk, L, D)
                                              const Tensor& cos,  // (L - prefix, R) or (B, L - prefix, R)
                                              const Tensor& sin,  // as cos
                                              bool interleaved, bool inverse, int64_t prefix);

}  // namespace rotary
}  // namespace fastrpe
