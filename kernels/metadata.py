"""What Triton's profiler (Proton) is told of a launch: `launch_metadata` of the kernels' jit, asked only while it runs.

flops are those of the recurrent product; bytes are those of every tensor, each moved once, which is the least:
W_hh is read before the time loop, everything else is read or written step by step.
"""


def of_launch(grid, kernel, args):
    """name, flops by width and bytes of a launch; kernel has Triton's metadata, args the arguments by name."""
    gates = args["x_gates_ptr"] if "x_gates_ptr" in args else args["d_x_gates_ptr"]  # (T, B, D, G, H)
    tensors = [arg for arg in args.values() if hasattr(arg, "element_size")]
    return {
        "name": f"{kernel.name} H={args['H']} T={args['T']} B={args['B']}",
        f"flops{8 * gates.element_size()}": 2 * gates.numel() * args["H"],
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
