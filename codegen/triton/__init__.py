"""The Triton backend: generated Triton kernels for GPUs, which tests also run interpreted on the CPU.

`table` prints decode programs, `tiles` the loads they need, `emitter` whole kernels, `space` and `model` choose
schedules, `launch` runs a generated module, `offline` compiles without a GPU, `interpret` mends Triton's interpreter.
Only `launch`, `offline`'s worker and `interpret.install` import triton.
"""
