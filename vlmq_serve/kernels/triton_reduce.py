"""What follows the main loop of a Triton product: a tile of sums goes to y, alone or added to those of other K ranges.

A K that is split over programs gives fp32 partial sums, one tile per program, laid out tile by tile so that neither
masks nor strides are needed. They are added in the order of the K ranges whoever adds them, so the same input gives
the same bits. Two ways, equal bit for bit:

* LAST: the program of a tile that arrives last adds. No second launch.
* LAUNCH: `sum_kernel` adds, one launch later, which orders everything by itself.

Why LAST is correct in the memory model of PTX. (1) Every thread of a program stores its sums, then all meet at a
barrier, which orders those stores before what thread 0 does next. (2) Thread 0 adds to the counter of the tile with
one atomic, acquire and release, at the scope of the GPU. Atomics on one address form a chain in which each reads what
the one before wrote, so the last one has synchronized with all others and, by (1), with the stores of their programs.
(3) The value is handed to the other threads of the program through shared memory and a barrier, so their loads come
after the acquire. (4) These loads bypass L1, which is not coherent between multiprocessors; the acquire alone would
do. Nobody waits for anybody: whichever programs run at the same time, there is no deadlock.

The counter is never reset: each of S programs adds ARRIVALS / S, so it is a multiple of ARRIVALS again when all have
arrived, whatever S the next kernel has. Products at the same time on two streams, which scratch forbids, would give
wrong sums once, and leave counters that work.
"""

import triton
import triton.language as tl

from vlmq_serve.kernels.plan import ARRIVALS

NONE, LAST, LAUNCH = 0, 1, 2
_ARRIVALS = tl.constexpr(ARRIVALS)


@triton.jit
def _store(acc, y_ptr, pid_n, pid_m, M, N, BM: tl.constexpr, BN: tl.constexpr, EVEN_N: tl.constexpr):
    """acc [BN, BM] to y [M, N], rounded to the type of y."""
    rn = pid_n * BN + tl.arange(0, BN)
    lm = tl.arange(0, BM)
    mask = (pid_m * BM + lm < M)[None, :]
    y_ptr += (pid_m * BM).to(tl.int64) * N
    out = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + lm[None, :] * N + rn[:, None], out, mask=mask if EVEN_N else mask & (rn < N)[:, None])


@triton.jit
def _sum(parts_ptr, splits, BM: tl.constexpr, BN: tl.constexpr):
    """Sum [BN, BM] of the tiles at parts_ptr, first to last; loads bypass L1.

    Read in one dimension: in two, the compiler may give a thread 32 bytes in a row, which it loads in two halves, each
    of half a sector.
    """
    inside = tl.arange(0, BN * BM)
    total = tl.zeros((BN * BM,), tl.float32)
    for s in range(splits):
        total += tl.load(parts_ptr + s * (BN * BM) + inside, cache_modifier=".cg")
    return tl.reshape(total, (BN, BM))


@triton.jit
def _finish(
    acc, y_ptr, parts_ptr, count_ptr, M, N, splits,
    BM: tl.constexpr, BN: tl.constexpr, REDUCE: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] is the sum of this program's K range; program ids are (tile of N, tile of M, K range)."""
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    if REDUCE == 0:
        _store(acc, y_ptr, pid_n, pid_m, M, N, BM, BN, EVEN_N)
    else:
        tile = pid_m * tl.num_programs(0) + pid_n
        parts_ptr += tile.to(tl.int64) * splits * (BN * BM)
        inside = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(parts_ptr + tl.program_id(2) * (BN * BM) + inside, acc)
        if REDUCE == 1:
            tl.debug_barrier()
            mine = _ARRIVALS // splits
            before = tl.atomic_add(count_ptr + tile, mine, sem="acq_rel", scope="gpu")
            if (before + mine) % _ARRIVALS == 0:
                total = _sum(parts_ptr, splits, BM, BN)
                _store(total, y_ptr, pid_n, pid_m, M, N, BM, BN, EVEN_N)


@triton.jit(do_not_specialize=["M", "splits"])
def sum_kernel(
    parts_ptr, y_ptr, M, N, splits, BM: tl.constexpr, BN: tl.constexpr, EVEN_N: tl.constexpr
):  # fmt: skip
    """Adds the partial sums of one tile per program: program ids are (tile of N, tile of M)."""
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    parts_ptr += (pid_m * tl.num_programs(0) + pid_n).to(tl.int64) * splits * (BN * BM)
    _store(_sum(parts_ptr, splits, BM, BN), y_ptr, pid_n, pid_m, M, N, BM, BN, EVEN_N)
