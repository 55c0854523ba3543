"""The C++ backend: kernels for x86 vector units and anything else a C++ compiler reaches."""
