"""The Triton halves of the kernels, imported on first use on a GPU (or by tests in Triton's interpreter).

Conventions of every file here:
- Pointers are named after the tensor, with its shape in the comment; float values are cast to float32 on the load line
  (the interpreter's bfloat16 arithmetic is wrong, and so would be the rounding).
- Widths are constexpr: with the padded width a multiple of 8 a load takes 16 bytes; with a run-time stride it takes 2.
- No autotuning: the launch table stands in each launcher, and `python -m fastil.kernels.aot` shows what it compiles to.
"""
