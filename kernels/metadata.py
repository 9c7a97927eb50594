"""What Triton's profiler (Proton) is told of a launch: `launch_metadata` of the kernels' jit, asked only while it runs.

flops are those of the recurrent product; bytes are those of every tensor, each moved once, which is the least:
W_hh is read before the time loop, everything else is read or written step by step.
"""


def of_launch(grid, kernel, args):
    """name, flops by width and bytes of a launch; kernel has Triton's metadata, args the arguments by name."""
    x_gates = args["inputs"].x_gates if "inputs" in args else args["grads"].d_x_gates  # [slots, R, G, H]
    H = x_gates.shape[-1]
    tensors = _tensors(tuple(args.values()))
    return {
        "name": f"{kernel.name} H={H} T={args['T']} B={args['B']}",
        f"flops{8 * x_gates.element_size()}": 2 * x_gates.numel() * H,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def _tensors(group):
    for member in group:
        if isinstance(member, tuple):
            yield from _tensors(member)
        elif hasattr(member, "element_size"):
            yield member
