// y = x W^T in order for 17 to 256 rows and 16-bit weights, and x A^T, which is x's last columns, in the same launch; by
// Hopper's wide instruction and its copy engine. What it is for and why it is so: adapted_matmul_cuda.py. Compiled at run
// time behind instructions.cu and low_blocks.cu, with these given, and what the latter says:
//   GROUPS        groups of four computing warps, 64 rows each    OUTPUTS_WIDE  outputs of a block
//   STAGES        of 128 columns in shared memory                 F16           float16 in place of bfloat16

struct Args {
    Map x, w, a;   // in blocks of 64 rows, of OUTPUTS_WIDE, of RANKS; 64 columns
    u16 *y, *low;
    float* parts;  // for each 64 rows
    u32* flags;    // likewise, 32 apart
    int y_stride, low_stride, rows, outputs, inputs, width, ranks, row_blocks;
};

#define COMPUTING (GROUPS * 4)
#define WARPS (COMPUTING + 1)  // the last one asks for x and W
#define ROWS_HERE (GROUPS * 64)
#define X_HALF (ROWS_HERE * 128)  // of 64 columns; multiples of 1024
#define W_HALF (OUTPUTS_WIDE * 128)
#define STAGE (2 * (X_HALF + W_HALF))
#define FILLED_AT (STAGES * STAGE)  // counters of stages: filled, and read
#define EMPTIED_AT (FILLED_AT + STAGES * 8)
#define OWN_BYTES (EMPTIED_AT + STAGES * 8)
#define SHARED_BYTES (OWN_BYTES > LOW_BYTES ? OWN_BYTES : LOW_BYTES)

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) adapted_matmul(const __grid_constant__ Args args) {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const u32 base = shared_address(shared), filled = base + FILLED_AT, emptied = base + EMPTIED_AT;
    const int low_blocks = (args.rows + 63) / 64 * LOW, own = (int)blockIdx.x - low_blocks;
    if (own < 0) {
        const int of = blockIdx.x / LOW;
        const Low low = {args.low, args.parts + of * (RUNS * 64 * RANKS), args.flags + of * 32,
                         args.low_stride, args.rows, args.ranks, args.inputs};
        if (make_low(low, args.x, args.a, of * 64, blockIdx.x % LOW, warp, lane)) tell_of_low(low);
        return;
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            counter_begin(filled + i * 8, 1);
            counter_begin(emptied + i * 8, COMPUTING);
        }
        SHOW_COUNTERS;
    }
    __syncthreads();
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
            if (n == args.inputs / 128)
                for (int row = first_row; row < min(first_row + ROWS_HERE, args.rows); row += 64)
                    hear_of_low(args.flags + row / 64 * 32, (gridDim.x - low_blocks) / args.row_blocks);
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
    MULTIPLIES_WAIT(0);
    keep(c);
    store(args.y + first_output, args.y_stride, first_row + warp * 16, args.rows, args.outputs - first_output, c, lane);
}
