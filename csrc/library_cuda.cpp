// The CUDA kernels behind the schemas of library_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include "cayley/cayley_cuda.h"
#include "linear/linear_attention_cuda.h"
#include "reflection/reflection_cuda.h"
#include "rotary/rotary_cuda.h"

STABLE_TORCH_LIBRARY_IMPL(fastrpe_native, CUDA, m) {
  m.impl("cayley_basis", TORCH_BOX(&fastrpe::cayley::cayley_basis_cuda));
  m.impl("cayley_basis_bwd", TORCH_BOX(&fastrpe::cayley::cayley_basis_bwd_cuda));
  m.impl("linear_attention", TORCH_BOX(&fastrpe::linear::linear_attention_cuda));
  m.impl("linear_attention_bwd", TORCH_BOX(&fastrpe::linear::linear_attention_bwd_cuda));
  m.impl("reflection_basis", TORCH_BOX(&fastrpe::reflection::reflection_basis_cuda));
  m.impl("reflection_basis_bwd", TORCH_BOX(&fastrpe::reflection::reflection_basis_bwd_cuda));
  m.impl("rotate", TORCH_BOX(&fastrpe::rotary::rotate_cuda));
  m.impl("rotate_basis", TORCH_BOX(&fastrpe::rotary::rotate_basis_cuda));
  m.impl("rotate_basis_bwd", TORCH_BOX(&fastrpe::rotary::rotate_basis_bwd_cuda));
  m.impl("rotate_bwd", TORCH_BOX(&fastrpe::rotary::rotate_bwd_cuda));
  m.impl("rotate_cos_sin", TORCH_BOX(&fastrpe::rotary::rotate_cos_sin_cuda));
}
