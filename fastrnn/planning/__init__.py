"""Which kernel runs, in which tiles, and why: pure functions of shapes and a device, a file a tier."""
