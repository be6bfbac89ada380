// x A^T with Hopper's wide instruction and its copy engine. Of 64 rows LOW blocks have a part of the runs each: a run of the
// inputs (an eighth, in whole 64) is summed in order in an accumulator, and the last block to end adds the runs' sums, from
// the first: low_rank.py, whose bits these are. Part of the sources of low_rank.cu, whose blocks are all such, and of
// products whose first blocks are, on multiprocessors that have no outputs, while the others wait for a flag:
// adapted_matmul.cu and nf4_wide.cu. With these given:
//   RANKS       in whole 16, as many as the instruction has        LOW      blocks for 64 rows; 0: none
//   LOW_STAGES  of 64 columns in shared memory                     LOW_BOX  rows of a block of x's map
//   CHAIN       begins while the kernel before runs, which makes x; A is older
#if LOW
struct Ring {
    int stage = 0, phase = 0;
    __device__ __forceinline__ void next(int stages) {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

template <int N> __device__ __forceinline__ void keep(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) KEEP_FLOAT(c[i]);
}
template <int N> __device__ __forceinline__ void clear(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) c[i] = 0.0f;
    keep(c);  // else the compiler waits for each product
}
// A warp's 16 rows from `row` on, each eight sums of a row behind one another; columns are even.
template <int N>
__device__ __forceinline__ void store(u16* to, int stride, int row, int rows, int columns, const float (&c)[N], int lane) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = row + lane / 4 + half * 8, column = j * 8 + lane % 4 * 2;
            if (at < rows && column < columns)
                *(u32*)(to + (u64)at * stride + column) = pair(c[j * 4 + half * 2], c[j * 4 + half * 2 + 1]);
        }
}

struct Low {
    u16* low;
    float* parts;  // if LOW > 1, sums of runs: of each run, four of a thread's and then the next thread's
    u32* flag;     // low is there; 16 behind it, if LOW > 1, of the blocks how many have made their runs
    int low_stride, rows, ranks, inputs;
#ifdef TWICE  // once more
    u16* also;
    int also_stride;
#endif
};
#define RUNS 8
#define LOW_STAGE (LOW_BOX * 128 + RANKS * 128)  // 64 columns of x and A
#define LOW_FILLED_AT (LOW_STAGES * LOW_STAGE)   // counters of stages: filled, and read
// The instruction reads 64 rows of the last stage, too, whatever lies there.
#define LOW_BEYOND (LOW_BOX + RANKS < 64 ? (64 - LOW_BOX - RANKS) * 128 : 0)
#define LOW_BYTES (LOW_FILLED_AT + max(LOW_STAGES * 16 + 16, LOW_BEYOND))
#define AT_ONCE (RANKS % 32 ? 8 : 16)  // sums whose runs are on their way together
// By a whole block of more than four warps, the number `which` of those that have the rows from `first_row` on. Whether it
// is there now: true for the first four warps of the block that wrote it.
__device__ __forceinline__ bool make_low(const Low& of, const Map& x, const Map& a, int first_row, int which, int warp, int lane) {
    const u32 base = shared_address(shared), filled = base + LOW_FILLED_AT, emptied = filled + LOW_STAGES * 8;
    if (threadIdx.x == 0) {
        for (int i = 0; i < LOW_STAGES; ++i) {
            counter_begin(filled + i * 8, 1);
            counter_begin(emptied + i * 8, 4);
        }
        SHOW_COUNTERS;
    }
    __syncthreads();
    const int length = (of.inputs + 64 * RUNS - 1) / (64 * RUNS) * 64, first_run = which * (RUNS / LOW);
    const int first = min(first_run * length, of.inputs), last = min((first_run + RUNS / LOW) * length, of.inputs);
    Ring ring;
    if (warp == 4 && lane == 0) {
        auto ask_a = [&](int column) {
            const u32 counter = filled + ring.stage * 8;
            counter_arrive_expecting(counter, LOW_STAGE);
            bring(base + ring.stage * LOW_STAGE + LOW_BOX * 128, a, column, 0, counter);
        };
        auto ask_x = [&](int column) {
            bring(base + ring.stage * LOW_STAGE, x, column, first_row, filled + ring.stage * 8);
        };
        const int begun = min(first + LOW_STAGES * 64, last);
        for (int column = first; column < begun; column += 64, ++ring.stage) ask_a(column);
        ring = Ring();
#if CHAIN
        BEFORE_HAS_ENDED;
        NEXT_MAY_BEGIN;
#endif
        for (int column = first; column < begun; column += 64, ring.next(LOW_STAGES)) ask_x(column);
#pragma unroll 1
        for (int column = begun; column < last; column += 64, ring.next(LOW_STAGES)) {
            counter_wait(emptied + ring.stage * 8, ring.phase ^ 1);
            ask_a(column);
            ask_x(column);
        }
    }
    if (warp >= 4) return false;
#if CHAIN
    BEFORE_HAS_ENDED;  // a block without inputs waits for nothing else before it writes
#endif
#if LOW == 1
    float total[RANKS / 2];
#endif
    float c[RANKS / 2];
    float4* const parts = (float4*)of.parts + threadIdx.x;
#pragma unroll 1
    for (int run = first_run; run < first_run + RUNS / LOW; ++run) {
        u32 before = 0;  // the stage whose products may still run
        clear(c);
#pragma unroll 1
        for (int column = run * length; column < min((run + 1) * length, of.inputs); column += 64) {
            counter_wait(filled + ring.stage * 8, ring.phase);
            const u32 at = base + ring.stage * LOW_STAGE;
            MULTIPLIES_BEGIN;
#pragma unroll
            for (int k = 0; k < 4; ++k)
                multiply_wide_both<RANKS>(c, described_both(at + k * 32), described_both(at + LOW_BOX * 128 + k * 32));
            MULTIPLIES_END;
            MULTIPLIES_WAIT(1);
            if (lane == 0 && before) counter_arrive(before);
            before = emptied + ring.stage * 8;
            ring.next(LOW_STAGES);
        }
        MULTIPLIES_WAIT(0);
        keep(c);
        if (lane == 0 && before) counter_arrive(before);
#if LOW == 1
#pragma unroll
        for (int i = 0; i < RANKS / 2; ++i) total[i] = run ? __fadd_rn(total[i], c[i]) : c[i];
#else
#pragma unroll
        for (int i = 0; i < RANKS / 8; ++i)
            parts[(run * (RANKS / 8) + i) * 128] = make_float4(c[i * 4], c[i * 4 + 1], c[i * 4 + 2], c[i * 4 + 3]);
#endif
    }
#if LOW > 1
    int* const arrived = (int*)(shared + LOW_FILLED_AT + LOW_STAGES * 16);
    MEET;
    if (threadIdx.x == 0) *arrived = count_arrivals((int*)of.flag + 16, 1);
    MEET;
    if (*arrived != LOW - 1) return false;
    if (threadIdx.x == 0) of.flag[16] = 0;
#pragma unroll 1
    for (int first = 0; first < RANKS / 2; first += AT_ONCE) {
        float sums[RUNS][AT_ONCE];
#pragma unroll
        for (int i = 0; i < RUNS * AT_ONCE / 4; ++i) {
            const int run = i / (AT_ONCE / 4), at = i % (AT_ONCE / 4);
            four_seen_by_all(sums[run] + at * 4, parts + (run * (RANKS / 8) + first / 4 + at) * 128);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
            for (int run = 1; run < RUNS; ++run) sums[0][i] = __fadd_rn(sums[0][i], sums[run][i]);
        store(of.low + first * 2, of.low_stride, first_row + warp * 16, of.rows, of.ranks - first * 2, sums[0], lane);
#ifdef TWICE
        store(of.also + first * 2, of.also_stride, first_row + warp * 16, of.rows, of.ranks - first * 2, sums[0], lane);
#endif
    }
#else
    store(of.low, of.low_stride, first_row + warp * 16, of.rows, of.ranks, total, lane);
#ifdef TWICE
    store(of.also, of.also_stride, first_row + warp * 16, of.rows, of.ranks, total, lane);
#endif
#endif
    return true;
}
// By those four warps, to the blocks that wait.
__device__ __forceinline__ void tell_of_low(const Low& of) {
    SHOW_FAR_WRITES;
    MEET;
    if (threadIdx.x == 0) flag_set(of.flag);
}
// One thread of each block that reads low: it is there, and the engine sees it. The last of so many `readers` makes the
// flag 0 again. The blocks that make it are the first of the grid: they have begun.
__device__ __forceinline__ void hear_of_low(u32* flag, u32 readers) {
    while (!flag_read(flag)) PAUSE;
    flag_count(flag, readers);
    SHOW_FAR_WRITES;
}
#endif
