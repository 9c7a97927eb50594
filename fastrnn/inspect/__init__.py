"""What the compiler made of a kernel: compiled for any target, counted, timed by a model and executed, without a GPU.

Modules:
    compile     run the launcher as on a GPU, up to the launch, for any architecture
    sass, ptx   NVIDIA's machine code and PTX, read
    flow        the time loop, and which global loads read W_hh, from PTX or LLVM IR
    cluster     accesses between thread blocks that no cluster barrier orders; addresses tells tiles apart
    resources   registers, spills, memories, tensor cores, loads of W_hh in the time loop
    timing      six bounds of a step's cycles: a quick look
    simulator   a step's cycles by simulation, and what they are spent on
    measure     measured time a step, on the GPU at hand
    memory      what a call allocates
    profile     time and memory of a layer over the length of the sequence, and traces
    translate   PTX as C: operands and instructions beside it, the machine around it in machine.h and schedule.h
    execute     the compiled PTX on the CPU
    verify      what it computes against the reference
    report      all of it as a record, a table, or files
    doctor      what this machine can run
    programs    the programs that these call
"""
