// x A^T, by the first LOW blocks: 16 ranks are the rows of the instruction's left operand, the rows of x the columns of
// the right one. A warp takes a run of the inputs (an eighth, in whole 64) for 16 ranks, LOW_COLUMNS at a time through
// shared memory, a block some of the runs for all ranks; the last block to end adds the runs' sums, from the first:
// low_rank.py, whose bits these are. It says so to all others.
#if LOW
#define RUNS 8
#define OWN_RUNS (RUNS / LOW)
#define LOW_FLAG(args) ((u32*)args.counts + 32)  // in a line of its own
#define LOW_ROW (LOW_COLUMNS * 2 + 16)
__device__ __forceinline__ void make_low(const Args& args, int warp, int lane) {
    const int g = lane / 4, t = lane % 4, K = args.K, length = (K + 64 * RUNS - 1) / (64 * RUNS) * 64;
    const int tiles = (args.ranks + 15) / 16, tasks = tiles * OWN_RUNS, own_first = blockIdx.x * OWN_RUNS;
    const u32 x_all = shared_address(shared), a_own = x_all + (OWN_RUNS * 8 + warp * 16) * LOW_ROW;
    auto columns_of = [&](int run, int stage) {  // how many
        return min(LOW_COLUMNS, min((run + 1) * length, K) - run * length - stage * LOW_COLUMNS);
    };
    auto copy_a = [&](int task, int stage) {
        const int run = own_first + task % OWN_RUNS, tile = task / OWN_RUNS, columns = columns_of(run, stage);
        const u16* const from = args.a + run * length + stage * LOW_COLUMNS;
#pragma unroll 1
        for (int row = 0; row < 16; ++row)  // beyond the last rank the last: that is multiplied by zeros of B
            for (int column = lane * 8; column < columns; column += 256)
                copy16(a_own + row * LOW_ROW + column * 2, from + (u64)min(tile * 16 + row, args.ranks - 1) * K + column);
    };
    auto copy_x = [&](int stage) {
#pragma unroll 1
        for (int row = warp; row < OWN_RUNS * args.rows; row += WARPS) {
            const int run = row % OWN_RUNS, columns = columns_of(own_first + run, stage);
            const u32 to = x_all + (run * 8 + row / OWN_RUNS) * LOW_ROW;
            const u16* const from =
                args.x + (u64)(row / OWN_RUNS) * args.x_stride + (own_first + run) * length + stage * LOW_COLUMNS;
            for (int column = lane * 8; column < columns; column += 256) copy16(to + column * 2, from + column);
        }
    };
    if (warp < tasks) copy_a(warp, 0);  // while the kernel before still runs
#if CHAIN
    BEFORE_HAS_ENDED;
    NEXT_MAY_BEGIN;
#endif
    bool copied = true;
#pragma unroll 1
    for (int first = 0; first < tasks; first += WARPS) {
        const int task = first + warp, run = own_first + task % OWN_RUNS;
        float c[4] = {};
#pragma unroll 1
        for (int stage = 0; stage * LOW_COLUMNS < length; ++stage) {
            if (task < tasks && !copied) copy_a(task, stage);
            copied = false;
            copy_x(stage);
            ALL_COPIES_WAIT;
            __syncthreads();
            const int columns = task < tasks ? columns_of(run, stage) : 0;
#pragma unroll 4
            for (int k = 0; k < columns; k += 32) {
                u32 left[2][4], x[4];  // of two steps
                read_pieces(left[0], a_own + lane % 16 * LOW_ROW + lane / 16 * 16 + k * 2);
                read_pieces(left[1], a_own + lane % 16 * LOW_ROW + lane / 16 * 16 + k * 2 + 32);
                read_pieces(x, x_all + (task % OWN_RUNS * 8 + lane % 8) * LOW_ROW + lane / 8 * 16 + k * 2);
                multiply(c, left[0][0], left[0][1], left[0][2], left[0][3], x[0], x[1]);
                multiply(c, left[1][0], left[1][1], left[1][2], left[1][3], x[2], x[3]);
            }
            __syncthreads();
        }
        float* const part = args.parts + (run * tiles + task / OWN_RUNS) * 128;  // [run][tile][rank][row]
        if (task < tasks)
#pragma unroll
            for (int i = 0; i < 4; ++i) part[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = c[i];
    }
    int* const last = (int*)shared;
    __syncthreads();
    if (threadIdx.x == 0) *last = count_arrivals(args.counts, 1);
    __syncthreads();
    if (*last != LOW - 1) return;
    for (int i = threadIdx.x; i < tiles * 128; i += WARPS * 32) {
        float sums[RUNS];
#pragma unroll
        for (int r = 0; r < RUNS; ++r) sums[r] = seen_by_all(args.parts + r * tiles * 128 + i);
        float sum = sums[0];
#pragma unroll
        for (int r = 1; r < RUNS; ++r) sum = __fadd_rn(sum, sums[r]);
        if (i % 8 < args.rows) args.low[(u64)(i % 8) * args.low_stride + i / 8] = (u16)pair(sum, 0.0f);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        args.counts[0] = 0;
        flag_set(LOW_FLAG(args));
    }
}
#endif
// One thread of a block listens, and then tells its block by a counter in shared memory, so that few ask for the flag at
// once. Told, each listener counts itself, and the last one's count makes the flag 0 again: before this kernel ends, with
// no one else's help, so that a graph may be replayed. The blocks that make low are the first of the grid: when another
// waits for them, they have begun.
#if LOW
__device__ __forceinline__ void listen(const Args& args, u32 low_is_there) {
    while (!flag_read(LOW_FLAG(args))) PAUSE;
    flag_count(LOW_FLAG(args), gridDim.x - LOW);
    counter_arrive(low_is_there);
}
#endif
