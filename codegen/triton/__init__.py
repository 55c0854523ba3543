"""The Triton backend: generated Triton kernels for GPUs, which tests also run interpreted on the CPU.

`table` prints decode programs, `frame` what all kernels share. `tiles` and `emitter` make kernels of scalar formats,
`vector_tiles` and `vector_emitter` those of vector formats. `space`, `model`, `vector_model` and `gpus` choose
schedules, `launch` runs a generated module, `offline` compiles without a GPU, `interpret` mends Triton's interpreter.
Only `launch`, `offline`'s worker and `interpret.install` import triton.
"""
