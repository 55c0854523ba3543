"""The CUTLASS backend: kernels in CuTe DSL for many tokens, compiled by the package nvidia-cutlass-dsl.

They read the packed weights of the CUDA backend, which is the better one for few tokens. `places` reads addresses off
the layout, `operands` and `printing` say how codes become operands, `plan` does a kernel's arithmetic, `emit` makes a
module of the texts in `text/`; `space` and `model` choose schedules, `toolchain` compiles in a process of its own,
`launch` runs, `offline` reads what the compiler made. Nothing here imports the DSL: only the generated module does.
"""
