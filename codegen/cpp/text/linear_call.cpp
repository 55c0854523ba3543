// The operator's product for Python, without torch's dispatcher: most of what a call costs is finding out that nobody
// wants to see it. Calls that somebody may want to see (modes, transforms, gradients, traces, profilers) are declined.
// The header that says what a tensor is for Python takes 20 s to compile (torch/csrc/autograd/python_variable.h), so where
// the tensor lies in the object is looked up in one, and what a library may lack is weak.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <Python.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstring>

PyObject* THPVariable_Wrap(const at::TensorBase& tensor) __attribute__((weak));

namespace {

// Python's classes of plain tensors, and bytes from the start of such an object to its at::Tensor, which is a pointer.
const PyTypeObject *tensor_class, *parameter_class;
size_t tensor_at;

bool unwatched() {
  const c10::DispatchKeySet usual({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  return (c10::impl::tls_local_dispatch_key_set().included_ - usual).empty() && !at::hasCallbacks() &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

// A tensor in this machine's memory that is nothing more; null for others.
const at::Tensor* plain(PyObject* given) {
  if (Py_TYPE(given) != tensor_class && Py_TYPE(given) != parameter_class) return nullptr;
  const at::Tensor& found = *reinterpret_cast<const at::Tensor*>(reinterpret_cast<const char*>(given) + tensor_at);
  const c10::DispatchKeySet usual({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU,
                                   c10::DispatchKey::ADInplaceOrView});
  const bool quiet = found.is_cpu() && usual.isSupersetOf(found.key_set());
  return quiet && !(found.requires_grad() && c10::GradMode::is_enabled()) ? &found : nullptr;
}

// linear(x, weight, bias, residual, spec), as the operator takes them; NotImplemented where the operator has to look.
PyObject* call_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const auto decline = [] { return Py_NewRef(Py_NotImplemented); };
  if (count != 5 || !PyList_CheckExact(args[1]) || !PyUnicode_Check(args[4]) || !unwatched()) return decline();
  const at::Tensor* const x = plain(args[0]);
  const size_t operands = size_t(PyList_GET_SIZE(args[1]));
  Py_ssize_t length = 0;
  const char* const spec = PyUnicode_AsUTF8AndSize(args[4], &length);
  if (x == nullptr || operands > kOperands || spec == nullptr) return PyErr_Clear(), decline();
  const at::Tensor none, *extra[2] = {&none, &none};
  for (int i = 0; i < 2; ++i)
    if (args[2 + i] != Py_None && (extra[i] = plain(args[2 + i])) == nullptr) return decline();
  Call call{*x, {}, operands, *extra[0], *extra[1], {spec, size_t(length)}};
  for (size_t i = 0; i < operands; ++i) {
    const at::Tensor* const weight = plain(PyList_GET_ITEM(args[1], Py_ssize_t(i)));
    if (weight == nullptr) return decline();
    call.weight[i] = weight->const_data_ptr();
  }
  at::Tensor out;
  PyThreadState* const thread = PyEval_SaveThread();  // the caller holds the arguments
  try {
    out = product(call);
  } catch (...) {
    out = at::Tensor();  // the operator meets the same, and says it
  }
  PyEval_RestoreThread(thread);
  return out.defined() ? THPVariable_Wrap(out) : decline();
}

}  // namespace

// `call_linear` as a Python function; None where this torch has its tensors otherwise. Takes torch.Tensor,
// torch.nn.Parameter and a tensor of the former with its `_cdata`.
LB_EXPORT PyObject* lb_python(PyObject* tensor, PyObject* parameter, PyObject* sample, const void* cdata) {
  static PyMethodDef method = {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_linear)),
                               METH_FASTCALL, nullptr};
  const char* const object = reinterpret_cast<const char*>(sample);
  const size_t size = size_t(Py_TYPE(sample)->tp_basicsize);
  for (size_t at = sizeof(PyObject); THPVariable_Wrap != nullptr && at + sizeof cdata <= size; at += sizeof cdata) {
    if (memcmp(object + at, &cdata, sizeof cdata) == 0) {
      tensor_class = reinterpret_cast<PyTypeObject*>(tensor), parameter_class = reinterpret_cast<PyTypeObject*>(parameter);
      tensor_at = at;
      return PyCFunction_New(&method, nullptr);
    }
  }
  Py_RETURN_NONE;
}
