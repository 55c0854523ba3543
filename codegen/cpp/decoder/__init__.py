"""A whole decoder-only transformer as one C++ program around the generated linear kernels."""
