"""A step's product: rows of A times a matrix, whose sums stay in registers.

    out[i] = A[i] W + rest(i)          A (rows, K), W (K, N) in panels (N / width, K, width), out (rows, N)

For each panel, which stays in the nearest cache, and each few rows: for k in K a vector of W's row k times A[i, k], for
all rows and vectors at once. Each sum is in the order of k, in parts of MOST, whatever rows it stands beside: results
do not depend on how a batch is divided. The rest is added last: sums that begin with it would be rounded to its size at
each k.
"""

from collections.abc import Callable

from .values import Code, Pointer, Value, Variable

MOST = 128  # terms of a part: errors of a longer sum would be larger than those of a BLAS
Rest = Callable[[Value, Value], Value]  # of a row and a column, the vector that is added to sums


def product(
    code: Code, A: Pointer, W: Pointer, out: Pointer, rows: Value, sizes: tuple[int, int, int, int],
    block: tuple[int, int], rest: Rest,
) -> None:  # fmt: skip
    """sizes: of a row of A, K, N and of a row of out; block: rows and vectors whose sums are kept."""
    stride, K, N, wide = sizes
    most, vectors = block
    width = vectors * code.width

    def tile(panel: Value, row: Value, count: int) -> None:
        own, column = W.at(panel * (K * width)), panel * width
        places = [(i, v) for i in range(count) for v in range(vectors)]
        sums = {place: Variable(code, code.number(0)) for place in places}
        totals = {place: Variable(code, code.number(0)) for place in places} if K > MOST else None

        def add(k: Value) -> None:
            weights = [own.load(k * width + v * code.width) for v in range(vectors)]
            for i in range(count):
                h = A.element((row + i) * stride + k)
                for v in range(vectors):
                    sums[i, v].put(code.call("llvm.fma", h, weights[v], sums[i, v].get()))

        if totals is None:
            with code.loop(K) as k:
                add(k)
        else:
            with code.loop(-(-K // MOST)) as part:
                begin = part * MOST
                with code.loop(code.where(begin + MOST < K, code.integer(MOST), K - begin)) as k:
                    add(begin + k)
                for place in places:
                    totals[place].put(totals[place].get() + sums[place].get())
                    sums[place].put(code.number(0))
        for i, v in places:
            at = column + v * code.width
            out.store((totals or sums)[i, v].get() + rest(row + i, at), (row + i) * wide + at)

    with code.loop(-(-N // width)) as panel:
        whole = rows // most
        with code.loop(whole) as number:
            tile(panel, number * most, most)
        count, done = most // 2, Variable(code, whole * most)
        while count:
            with code.when((rows - done.get()) >= count):
                tile(panel, done.get(), count)
                done.put(done.get() + count)
            count //= 2
