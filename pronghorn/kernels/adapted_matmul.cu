// y = x W^T in order for 17 to 256 rows and 16-bit weights, and x A^T, which is x's last columns, in the same launch; by
// Hopper's wide instruction and its copy engine. What it is for and why it is so: adapted_matmul_cuda.py. Compiled at run
// time behind instructions.cu, with these given:
//   GROUPS        groups of four computing warps, 64 rows each    OUTPUTS_WIDE  outputs of a block
//   STAGES        of 128 columns in shared memory                 F16           float16 in place of bfloat16
//   LEFT          x goes to registers first, not by the instruction
//   RANKS         the adapters' ranks, in whole 16                LOW           blocks that make x A^T of 64 rows
//   CHAIN         begins while the kernel before runs, which makes x

struct Args {
    Map x, w, a;   // in blocks of 64 rows, of OUTPUTS_WIDE, of RANKS; 64 columns
    u16 *y, *low;
    float* parts;  // sums of runs: of 64 rows, of each run, a thread's behind one another
    u32* flags;    // for each 64 rows, 32 apart: low is there; behind it, of its blocks how many have made their runs
    int y_stride, low_stride, rows, outputs, inputs, width, ranks, run, row_blocks;
};

#define COMPUTING (GROUPS * 4)
#define WARPS (COMPUTING + 1)  // the last one asks for x and W
#define ROWS_HERE (GROUPS * 64)
#define X_HALF (ROWS_HERE * 128)  // of 64 columns; multiples of 1024
#define W_HALF (OUTPUTS_WIDE * 128)
#define STAGE (2 * (X_HALF + W_HALF))
#define LOW_STAGE (8192 + RANKS * 128)                  // of 64 columns
#define LOW_STAGES min(STAGES * STAGE / LOW_STAGE, 16)  // of x and A, where x A^T is made
#define FILLED_AT (STAGES * STAGE)                      // counters of stages, as many as x A^T may need: filled, and read
#define EMPTIED_AT (FILLED_AT + 16 * 8)
#define ARRIVED_AT (EMPTIED_AT + 16 * 8)
#define SHARED_BYTES (ARRIVED_AT + 16)

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

// x A^T of 64 rows, by LOW blocks: a run of the inputs (an eighth, in whole 64) after another, each in order in an
// accumulator; the last block to end adds the runs' sums, from the first: low_rank.py, whose bits these are.
#define RUNS 8
#define AT_ONCE (RANKS % 32 ? 8 : 16)  // sums whose runs are on their way together
__device__ __forceinline__ void make_low(const Args& args, u32 base, int warp, int lane) {
    const u32 filled = base + FILLED_AT, emptied = base + EMPTIED_AT;
    const int of = blockIdx.x / LOW, first_row = of * 64, first_run = blockIdx.x % LOW * (RUNS / LOW);
    const int first = min(first_run * args.run, args.inputs), last = min((first_run + RUNS / LOW) * args.run, args.inputs);
    Ring ring;
    if (warp == COMPUTING && lane == 0) {
#if CHAIN
        BEFORE_HAS_ENDED;
        NEXT_MAY_BEGIN;
#endif
#pragma unroll 1
        for (int column = first; column < last; column += 64, ring.next(LOW_STAGES)) {
            if (column - first >= LOW_STAGES * 64) counter_wait(emptied + ring.stage * 8, ring.phase ^ 1);
            const u32 counter = filled + ring.stage * 8, to = base + ring.stage * LOW_STAGE;
            counter_arrive_expecting(counter, LOW_STAGE);
            bring(to, args.x, column, first_row, counter);
            bring(to + 8192, args.a, column, 0, counter);
        }
    }
    if (warp >= 4) return;
#if CHAIN
    BEFORE_HAS_ENDED;  // a block without inputs waits for nothing else before it writes
#endif
#if LOW == 1
    float total[RANKS / 2];
#endif
    float c[RANKS / 2];
    float* const parts = args.parts + of * (RUNS * 64 * RANKS) + threadIdx.x;
#pragma unroll 1
    for (int run = first_run; run < first_run + RUNS / LOW; ++run) {
        u32 before = 0;  // the stage whose products may still run
        clear(c);
#pragma unroll 1
        for (int column = run * args.run; column < min((run + 1) * args.run, args.inputs); column += 64) {
            counter_wait(filled + ring.stage * 8, ring.phase);
            const u32 at = base + ring.stage * LOW_STAGE;
            MULTIPLIES_BEGIN;
#pragma unroll
            for (int k = 0; k < 4; ++k)
                multiply_wide_both<RANKS>(c, described_both(at + k * 32), described_both(at + 8192 + k * 32));
            MULTIPLIES_END;
            MULTIPLIES_WAIT(1);
            if (lane == 0 && before) counter_arrive(before);
            before = emptied + ring.stage * 8;
            ring.next(LOW_STAGES);
        }
        MULTIPLIES_WAIT(0);
        keep(c);
        if (lane == 0 && before) counter_arrive(before);
#pragma unroll
        for (int i = 0; i < RANKS / 2; ++i)
#if LOW == 1
            total[i] = run ? __fadd_rn(total[i], c[i]) : c[i];
#else
            parts[(run * (RANKS / 2) + i) * 128] = c[i];
#endif
    }
    u32* const flag = args.flags + of * 32;
#if LOW > 1
    int* const arrived = (int*)(shared + ARRIVED_AT);
    MEET;
    if (threadIdx.x == 0) *arrived = count_arrivals((int*)flag + 16, 1);
    MEET;
    if (*arrived != LOW - 1) return;
#pragma unroll 1
    for (int first = 0; first < RANKS / 2; first += AT_ONCE) {
        float sums[RUNS][AT_ONCE];
#pragma unroll
        for (int i = 0; i < RUNS * AT_ONCE; ++i)
            sums[i / AT_ONCE][i % AT_ONCE] = seen_by_all(parts + (i / AT_ONCE * (RANKS / 2) + first + i % AT_ONCE) * 128);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
            for (int run = 1; run < RUNS; ++run) sums[0][i] = __fadd_rn(sums[0][i], sums[run][i]);
        store(args.low + first * 2, args.low_stride, first_row + warp * 16, args.rows, args.ranks - first * 2, sums[0], lane);
    }
#else
    store(args.low, args.low_stride, first_row + warp * 16, args.rows, args.ranks, total, lane);
#endif
    SHOW_FAR_WRITES;
    MEET;
    if (threadIdx.x == 0) {
        flag[16] = 0;
        flag_set(flag);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) adapted_matmul(const __grid_constant__ Args args) {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const u32 base = shared_address(shared), filled = base + FILLED_AT, emptied = base + EMPTIED_AT;
    const int low_blocks = (args.rows + 63) / 64 * LOW, own = (int)blockIdx.x - low_blocks;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 16; ++i) {
            counter_begin(filled + i * 8, 1);
            counter_begin(emptied + i * 8, own < 0 ? 4 : COMPUTING);
        }
        SHOW_COUNTERS;
    }
    __syncthreads();
    if (own < 0) return make_low(args, base, warp, lane);
    // Blocks that share W begin side by side.
    const int first_row = own % args.row_blocks * ROWS_HERE, first_output = own / args.row_blocks * OUTPUTS_WIDE;
    const int steps = (args.width + 127) / 128;
    Ring ring;
    if (warp == COMPUTING) {
        if (lane) return;
        auto ask_w = [&](int n) {
            const u32 counter = filled + ring.stage * 8, to = base + ring.stage * STAGE + 2 * X_HALF;
            counter_arrive_expecting(counter, STAGE);
            bring(to, args.w, n * 128, first_output, counter);
            bring(to + W_HALF, args.w, n * 128 + 64, first_output, counter);
        };
        auto ask_x = [&](int n) {
            if (n == args.inputs / 128) {
                for (int row = first_row; row < min(first_row + ROWS_HERE, args.rows); row += 64) {
                    u32* const flag = args.flags + row / 64 * 32;
                    while (!flag_read(flag)) PAUSE;
                    flag_count(flag, (gridDim.x - low_blocks) / args.row_blocks);  // the last one's makes it 0 again
                }
                SHOW_FAR_WRITES;
            }
            const u32 counter = filled + ring.stage * 8, to = base + ring.stage * STAGE;
#pragma unroll
            for (int row = 0; row < ROWS_HERE; row += 64) {
                bring(to + row * 128, args.x, n * 128, first_row + row, counter);
                bring(to + X_HALF + row * 128, args.x, n * 128 + 64, first_row + row, counter);
            }
        };
        const int begun = min(steps, STAGES);
        for (int n = 0; n < begun; ++n, ++ring.stage) ask_w(n);
        ring = Ring();
#if CHAIN
        BEFORE_HAS_ENDED;
        NEXT_MAY_BEGIN;
#endif
        for (int n = 0; n < begun; ++n, ring.next(STAGES)) ask_x(n);
#pragma unroll 1
        for (int n = STAGES; n < steps; ++n, ring.next(STAGES)) {
            counter_wait(emptied + ring.stage * 8, ring.phase ^ 1);
            ask_w(n);
            ask_x(n);
        }
        return;
    }
    float c[OUTPUTS_WIDE / 2];
    clear(c);
#if LEFT
    // x in registers: of two stages, as products read one's while the other's are read.
    u32 x[2][8][4] = {};
    const int row = warp % 4 * 16 + lane % 16, turned = row % 8 * 16;
    const u32 x_row = base + warp / 4 * 8192 + row * 128;
    auto read_left = [&](u32 (*to)[4], int stage) {
#pragma unroll
        for (int k = 0; k < 8; ++k)
            read_pieces(to[k], x_row + stage * STAGE + k / 4 * X_HALF + (k % 4 * 32 + lane / 16 * 16 ^ turned));
    };
    auto keep_left = [&](u32 (*of)[4]) {
#pragma unroll
        for (int i = 0; i < 32; ++i) KEEP(of[i / 4][i % 4]);
    };
    counter_wait(filled, 0);
    read_left(x[0], 0);
#pragma unroll 1
    for (int first = 0; first < steps; first += 2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (first + half >= steps) break;
            const u32 w_at = base + ring.stage * STAGE + 2 * X_HALF, before = ring.stage == 0 ? STAGES - 1 : ring.stage - 1;
            MULTIPLIES_BEGIN;
#pragma unroll
            for (int k = 0; k < 8; ++k)
                multiply_wide_left<OUTPUTS_WIDE>(c, x[half][k], described_both(w_at + k / 4 * W_HALF + k % 4 * 32));
            MULTIPLIES_END;
            MULTIPLIES_WAIT(1);
            keep_left(x[1 - half]);
            if (lane == 0 && first + half > 0) counter_arrive(emptied + before * 8);
            ring.next(STAGES);
            if (first + half + 1 < steps) {
                counter_wait(filled + ring.stage * 8, ring.phase);
                read_left(x[1 - half], ring.stage);
            }
        }
    }
#else
    u32 before = 0;
#pragma unroll 1
    for (int n = 0; n < steps; ++n, ring.next(STAGES)) {
        counter_wait(filled + ring.stage * 8, ring.phase);
        const u32 x_at = base + ring.stage * STAGE + warp / 4 * 8192, w_at = base + ring.stage * STAGE + 2 * X_HALF;
        MULTIPLIES_BEGIN;
#pragma unroll
        for (int k = 0; k < 8; ++k)
            multiply_wide_both<OUTPUTS_WIDE>(
                c, described_both(x_at + k / 4 * X_HALF + k % 4 * 32), described_both(w_at + k / 4 * W_HALF + k % 4 * 32));
        MULTIPLIES_END;
        MULTIPLIES_WAIT(1);
        if (lane == 0 && n > 0) counter_arrive(before);
        before = emptied + ring.stage * 8;
    }
#endif
    MULTIPLIES_WAIT(0);
    keep(c);
    store(args.y + first_output, args.y_stride, first_row + warp * 16, args.rows, args.outputs - first_output, c, lane);
}
