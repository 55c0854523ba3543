// torch's operator lowbit::linear on CPUs, without Python: it finds the kernel that Python entered for the call, makes
// the output and runs it. Whatever is not plain goes to the Python implementation, lowbit::linear_python.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <string>
#include <string_view>

#define LB_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using torch::jit::Stack;

// As in run.h.
typedef int (*Run)(const void* x, int64_t m, const void* const* weight, const float* bias, const void* residual,
                   void* out, void* scratch, int64_t scratch_bytes, int threads);

// What ctypes fills: a kernel, the numbers of tokens it is for, and whether it reads a bias or a residual.
struct Kernel {
  Run run;
  int64_t first, last, k, n, operands, bias, residual, shared_bytes, token_bytes, thread_bytes;
};

// Entries are never freed, for a call may be reading one: so calls need no lock, which a fork could leave locked.
struct Entry {
  const std::string spec;
  const at::ScalarType dtype;
  const Kernel kernel;
  const Entry* const next;
};

constexpr size_t kHeads = 1024;
std::atomic<const Entry*> heads[kHeads];

std::atomic<const Entry*>& head_of(std::string_view spec) {
  return heads[std::hash<std::string_view>()(spec) % kHeads];
}

at::ScalarType dtype_of(const std::string& name) {
  return name == "f32" ? at::kFloat : name == "f16" ? at::kHalf : at::kBFloat16;
}

const Kernel* find(std::string_view spec, at::ScalarType dtype, int64_t m) {
  for (const Entry* e = head_of(spec).load(std::memory_order_acquire); e != nullptr; e = e->next) {
    if (e->dtype == dtype && m >= e->kernel.first && m <= e->kernel.last && e->spec == spec) return &e->kernel;
  }
  return nullptr;
}

// Memory of the calling thread; kept, and grown when a call needs more.
void* scratch(int64_t bytes) {
  static thread_local std::unique_ptr<uint8_t[]> room;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    size = 0;
    room.reset(new uint8_t[bytes]);
    size = bytes;
  }
  return room.get();
}

// The arguments of a call; undefined tensors for none.
constexpr size_t kOperands = 16;
struct Call {
  const at::Tensor& x;
  const void* weight[kOperands];
  size_t operands;
  const at::Tensor &bias, &residual;
  std::string_view spec;
};

// float32 and contiguous, as kernels take it.
at::Tensor floats(const at::Tensor& bias) {
  if (!bias.defined() || (bias.scalar_type() == at::kFloat && bias.is_contiguous())) return bias;
  return bias.to(at::kFloat).contiguous();
}

bool addable(const at::Tensor& residual, const at::Tensor& x, int64_t numel) {
  return residual.scalar_type() == x.scalar_type() && residual.is_contiguous() && residual.numel() == numel;
}

const void* data_of(const at::Tensor& given) { return given.defined() ? given.const_data_ptr() : nullptr; }

// The product, or an undefined tensor where Python has to look at the call.
at::Tensor product(const Call& call) {
  const at::Tensor& x = call.x;
  const int64_t dims = x.dim(), k = dims > 0 ? x.size(-1) : 0;
  if (k == 0 || x.numel() == 0 || !x.is_contiguous()) return {};
  const int64_t m = x.numel() / k;
  const Kernel* const kernel = find(call.spec, x.scalar_type(), m);
  if (kernel == nullptr || kernel->k != k || call.operands != size_t(kernel->operands)) return {};
  if ((kernel->bias && !call.bias.defined()) || (kernel->residual && !call.residual.defined())) return {};
  if (call.residual.defined() && !addable(call.residual, x, m * kernel->n)) return {};
  const at::Tensor offset = floats(call.bias);
  c10::SmallVector<int64_t, 8> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = kernel->n;
  at::Tensor out = at::detail::empty_cpu(shape, x.scalar_type());
  const int threads = at::get_num_threads();
  const int64_t bytes = kernel->shared_bytes + kernel->token_bytes * m + kernel->thread_bytes * threads + 256;
  const int status = kernel->run(x.const_data_ptr(), m, call.weight, static_cast<const float*>(data_of(offset)),
                                 data_of(call.residual), out.mutable_data_ptr(), scratch(bytes), bytes, threads);
  return status == 0 ? out : at::Tensor();
}

// The product of a call of the operator, likewise.
at::Tensor product_of(const Stack& stack) {
  using torch::jit::peek;
  const auto optional = [&](size_t at) {
    const c10::IValue& given = peek(stack, at, 5);
    return given.isNone() ? at::Tensor() : given.toTensor();
  };
  const c10::ArrayRef<c10::IValue> weight = peek(stack, 1, 5).toListRef();
  if (weight.size() > kOperands) return {};
  const at::Tensor bias = optional(2), residual = optional(3);
  Call call{peek(stack, 0, 5).toTensor(), {}, weight.size(), bias, residual, peek(stack, 4, 5).toStringRef()};
  for (size_t i = 0; i < weight.size(); ++i) call.weight[i] = weight[i].toTensor().const_data_ptr();
  return product(call);
}

void linear(const c10::OperatorHandle&, Stack* stack) {
  at::Tensor out = product_of(*stack);
  if (out.defined()) {
    torch::jit::drop(*stack, 5);
    torch::jit::push(*stack, std::move(out));
    return;
  }
  static const c10::OperatorHandle python =
      c10::Dispatcher::singleton().findSchemaOrThrow("lowbit::linear_python", "");
  python.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);  // its errors pass through as they are
}

// Taking Python's place is meant, so torch's warning about it is neither shown nor used up.
struct Silent : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

// Make this the operator's implementation on CPUs; returns what torch says against it, or null.
LB_EXPORT const char* lb_install() noexcept {
  static std::string error;
  try {
    Silent silent;
    const c10::WarningUtils::WarningHandlerGuard quiet(&silent);
    const c10::WarningUtils::WarnAlways always;
    // Kept for good: undoing it when the process ends could meet calls of other threads.
    static auto* const library = new torch::Library(torch::Library::IMPL, "lowbit", c10::DispatchKey::CPU, __FILE__, 0);
    library->impl("linear", torch::CppFunction::makeFromBoxedFunction<&linear>());
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

// Calls of `spec` with activations of `dtype` run `kernel` from now on. Callers take turns.
LB_EXPORT void lb_enter(const char* spec, const char* dtype, const Kernel* kernel) {
  std::atomic<const Entry*>& head = head_of(spec);
  head.store(new Entry{spec, dtype_of(dtype), *kernel, head.load()}, std::memory_order_release);
}

// All calls are Python's until kernels are entered again.
LB_EXPORT void lb_forget() {
  for (std::atomic<const Entry*>& head : heads) head.store(nullptr);
}
