// `vlmq::gemm_integer` for torch's dispatcher: a call through Python would take longer than a small product.
//
// Uses torch's stable interface only. The kernels are those of an instruction set, in a library of their own, told by
// vlmq_bind().
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t ROWS = 32, COLS = 32;  // of a block, as in codes.h

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Gemm = void (*)(const void* x, int64_t stride, int type, int64_t rows, const void* codes, const void* scales,
                      int scale_type, const void* zeros, int bits, int64_t cols, int64_t groups, int64_t features, void* y,
                      void* scratch, int x_bits, int threads);
using Scratch = int64_t (*)(int64_t rows, int64_t cols);

struct {
  Gemm gemm;
  Scratch scratch;
  int64_t max_rows;    // of x in a call
  int64_t dense_rows;  // of bf16 x from which `vlmq::gemm_dense` serves
} kernels;

int type_of(const Tensor& t) {  // as in codes.h
  switch (t.scalar_type()) {
    case ScalarType::Float: return 0;
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    default: STD_TORCH_CHECK(false, "vlmq::gemm_integer: float32, bfloat16 and float16 are supported"); return -1;
  }
}

Tensor dense(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& zeros, int64_t bits,
             int64_t features) {
  StableIValue stack[] = {torch::stable::detail::from(x), torch::stable::detail::from(codes),
                          torch::stable::detail::from(scales), torch::stable::detail::from(zeros),
                          torch::stable::detail::from(bits), torch::stable::detail::from(features)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("vlmq::gemm_dense", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// [..., features] for x [..., K], in its type.
Tensor empty_with(const Tensor& x, int64_t features) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(sizes.size(), 1);
  sizes.back() = features;
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  // Not by the dispatcher, which looks operators up by their name.
  int32_t type, device;
  AtenTensorHandle y;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type, device, 0, &y));
  return Tensor(y);
}

// Kept from call to call, as fresh memory is cold.
void* scratch_of(int64_t size) {
  struct alignas(64) Line {
    char bytes[64];
  };
  thread_local std::vector<Line> lines;
  if (size > (int64_t)(lines.size() * sizeof(Line))) lines.resize(size / sizeof(Line) + 1);
  return lines.data();
}

// That the weight is one of `prepare_integer` for x, as the kernels would read past its end, or what is no weight.
void check(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& zeros, int64_t bits,
           int64_t features, int64_t x_bits) {
  STD_TORCH_CHECK(x.dim() > 0 && codes.dim() == 3 && scales.dim() == 3, "vlmq::gemm_integer: got a weight of another layout");
  const int64_t cols = x.size(-1), blocks = codes.size(0), groups = scales.size(1);
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "vlmq::gemm_integer: got ", bits, " bits");
  STD_TORCH_CHECK(x_bits == 16 || x_bits == 8, "vlmq::gemm_integer: got ", x_bits, " bits of x");
  STD_TORCH_CHECK(cols > 0 && codes.size(1) * 32 == cols * bits, "vlmq::gemm_integer: got x with K=", cols,
                  " for a weight with K=", codes.size(1) * 32 / bits);
  STD_TORCH_CHECK(codes.size(2) == ROWS && scales.size(2) == ROWS && scales.size(0) == blocks && groups > 0 &&
                      cols % groups == 0 && cols / groups % COLS == 0 && features <= blocks * ROWS &&
                      codes.scalar_type() == ScalarType::Int &&
                      (zeros.numel() == 0 || (zeros.numel() == scales.numel() && zeros.scalar_type() == ScalarType::Byte)),
                  "vlmq::gemm_integer: got a weight of another layout");
  // Tensors elsewhere than on the CPU have not come here: the dispatcher looks for operators of their device.
  STD_TORCH_CHECK(codes.is_contiguous() && scales.is_contiguous() && zeros.is_contiguous(),
                  "vlmq::gemm_integer: got a weight that is not contiguous; pass its tensors as prepare() made them");
}

// x [..., K] to [..., N] in its type; the weight as `prepare_integer` lays it out.
Tensor gemm_integer(Tensor x, Tensor codes, Tensor scales, Tensor zeros, int64_t bits, int64_t features, int64_t x_bits) {
  check(x, codes, scales, zeros, bits, features, x_bits);
  const int64_t cols = x.size(-1), groups = scales.size(1), rows = x.numel() / cols;
  if (rows >= kernels.dense_rows && x.scalar_type() == ScalarType::BFloat16)
    return dense(x, codes, scales, zeros, bits, features);
  const bool rows_apart = x.dim() == 2 && x.stride(1) == 1;
  if (!rows_apart && !x.is_contiguous()) x = torch::stable::contiguous(x);
  Tensor y = empty_with(x, features);
  if (rows == 0) return y;
  const int64_t stride = rows_apart ? x.stride(0) : cols, step = std::min(rows, kernels.max_rows), size = x.element_size();
  void* const scratch = scratch_of(kernels.scratch(step, cols));
  const int type = type_of(x), threads = (int)torch::stable::get_num_threads();
  const void* const zeros_at = zeros.numel() ? zeros.const_data_ptr() : nullptr;
  for (int64_t from = 0; from < rows; from += step)
    kernels.gemm((const char*)x.const_data_ptr() + from * stride * size, stride, type, std::min(step, rows - from),
                 codes.const_data_ptr(), scales.const_data_ptr(), type_of(scales), zeros_at, (int)bits, cols, groups,
                 features, (char*)y.mutable_data_ptr() + from * features * size, scratch, (int)x_bits,
                 threads);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(vlmq, CPU, library) { library.impl("gemm_integer", TORCH_BOX(&gemm_integer)); }

}  // namespace

extern "C" __attribute__((visibility("default"))) void vlmq_bind(Gemm gemm, Scratch scratch, int64_t max_rows, int64_t dense_rows) {
  kernels = {gemm, scratch, max_rows, dense_rows};
}
