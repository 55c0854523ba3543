"""The TVM backend: kernels by Apache TVM's own LLVM, fast ones for CPUs without a C++ compiler, and a second opinion.

`printing` prints decode programs, `plan` knows sizes and where codes lie, `sides`, `frame` and `epilogue` are what
kernels share, `direct` and `buffered` make them for few and for many tokens. `model` chooses schedules, `toolchain`
compiles and loads, `launch` calls. Only `toolchain` imports tvm.
"""
