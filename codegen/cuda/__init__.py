"""The CUDA backend: generated CUDA C++ for tensor cores, compiled by nvcc or shipped compiled.

`value` reads a format's decode program, `bits` and `recipe` turn it into integer instructions on packed words, proven
for every code before use. `plan` does a kernel's arithmetic, `emit` prints its traits over the headers in `text/`;
`space` and `model` choose schedules; `toolchain` compiles, `driver` and `launch` run, `offline` reads what the compiler
made, `emulate` runs the same source on the CPU, lane by lane. Only `driver` needs a GPU.
"""
