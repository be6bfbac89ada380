// y = x W^T in order for 17 to 256 rows and 16-bit weights, and x A^T, which is x's last columns, in the same launch; by
// Hopper's wide instruction and its copy engine. What it is for and why it is so: adapted_matmul_cuda.py. Compiled at run
// time behind instructions.cu and low_blocks.cu, with these given, and what the latter says:
//   GROUPS        groups of four computing warps, 64 rows each    OUTPUTS_WIDE  outputs of a block
//   STAGES        of 128 columns in shared memory                 F16           float16 in place of bfloat16
//   CODED         of eight steps of 128 columns, how many have their weights made of NF4 codes here; 0: none
//   CODES         such steps whose codes are in shared memory: an even number, and no fewer steps than STAGES between

struct Args {
    Map x, a;      // in blocks of 64 rows, of RANKS; 64 columns
    Map xs, w;     // in blocks of ROWS_HERE rows, of OUTPUTS_WIDE; 64 columns and then 64
    u16 *y, *low;
    float* parts;  // for each 64 rows
    u32* flags;    // likewise, 32 apart
    int y_stride, low_stride, rows, outputs, inputs, width, ranks, row_blocks;
    const u8* codes;  // if CODED: of each such step, of each 8 outputs, two tiles of 64 columns (nf4_layout.py), and behind
    float nf4[16];    // them their scales [2][8]; the levels of a code
};

#define COMPUTING (GROUPS * 4)
#define TEAMS 2                                              // of four warps that make weights, if CODED
#define WARPS (COMPUTING + 2 + (CODED ? 1 + TEAMS * 4 : 0))  // behind those that multiply, one asks for W, x, codes each
#define ROWS_HERE (GROUPS * 64)
#define X_HALF (ROWS_HERE * 128)  // of 64 columns; multiples of 1024
#define W_HALF (OUTPUTS_WIDE * 128)
#define STAGE (2 * (X_HALF + W_HALF))
#define EIGHT_CODES 576  // bytes of a coded step for 8 outputs
#define CODES_BYTES ((OUTPUTS_WIDE / 8 * EIGHT_CODES + 127) / 128 * 128)
#define TILES ((OUTPUTS_WIDE / 4 + 3) / 4)  // of codes, 8 outputs and 64 columns, that a warp has of a step
#define FILLED_AT (STAGES * STAGE)  // counters of stages: filled, and read
#define EMPTIED_AT (FILLED_AT + STAGES * 8)
#define CODES_AT (EMPTIED_AT + STAGES * 8)  // if CODED: of coded steps the codes, each second one a team's
#define COUNTS_AT (CODES_AT + CODES * CODES_BYTES)  // counters: codes there, read, their weights' place free; weights made
#define MADE_AT (COUNTS_AT + CODES * 24)
#define LEVELS_AT ((MADE_AT + STAGES * 8 + 127) / 128 * 128)  // a code's level, for each lane
#define OWN_BYTES (CODED ? LEVELS_AT + 2048 : CODES_AT)
#define SHARED_BYTES (OWN_BYTES > LOW_BYTES ? OWN_BYTES : LOW_BYTES)

#if CODED
// Steps of columns, among them those whose weights are codes: spread evenly.
__device__ __forceinline__ bool is_coded(int step, int inputs) {
    return step < inputs / 128 && step * CODED / 8 != (step + 1) * CODED / 8;
}
#define CODED_STEP(i) (((i + 1) * 8 + CODED - 1) / CODED - 1)  // the number i of them
// Weights of coded steps, by a team of four warps that has each second one. What a thread makes of a tile of codes are two
// columns of each eight, of one output.
__device__ __forceinline__ void make_weights(const Args& args, u32 base, int team, int warp, int lane) {
    const float* const levels = (const float*)(shared + LEVELS_AT) + lane;
    const int g = lane / 4, t = lane % 4, steps = args.inputs / 128 * CODED / 8;
#pragma unroll 1
    for (int i = team; i < steps; i += TEAMS) {
        const int slot = i % CODES, phase = i / CODES & 1;
        const u32 counts = base + COUNTS_AT + slot * 24;
        const u8* const codes = shared + CODES_AT + slot * CODES_BYTES;
        u8* const w = shared + CODED_STEP(i) % STAGES * STAGE + 2 * X_HALF;
        u32 made[TILES][8];
        counter_wait(counts, phase);
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            const int tile = min(j * 4 + warp, OUTPUTS_WIDE / 4 - 1), half = tile % 2;
            const u8* const own = codes + tile / 2 * EIGHT_CODES;
            const uint2 v = *(const uint2*)(own + half * 256 + lane * 8);
            const float scale = *(const float*)(own + 512 + half * 32 + g * 4);
#pragma unroll
            for (int q = 0; q < 8; ++q) {
                const u32 code = (q % 2 ? v.y : v.x) >> q / 2 * 8 & 255;
                made[j][q] = pair(scaled(levels[code / 16 * 32], scale), scaled(levels[code % 16 * 32], scale));
            }
        }
        __syncwarp();
        if (lane == 0) counter_arrive(counts + 8);
        counter_wait(counts + 16, phase);
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            const int tile = j * 4 + warp;
            if (tile >= OUTPUTS_WIDE / 4) break;
            u8* const to = w + tile % 2 * W_HALF + (tile / 2 * 8 + g) * 128 + t * 4;
#pragma unroll
            for (int q = 0; q < 8; ++q) *(u32*)(to + (q ^ g) * 16) = made[j][q];
        }
        SHOW_WRITES;
        __syncwarp();
        if (lane == 0) counter_arrive(base + MADE_AT + i % STAGES * 8);
    }
}
#endif

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
            counter_begin(filled + i * 8, 2);
            counter_begin(emptied + i * 8, COMPUTING);
#if CODED
            counter_begin(base + MADE_AT + i * 8, 4);
#endif
        }
#if CODED
        for (int i = 0; i < CODES; ++i) {
            counter_begin(base + COUNTS_AT + i * 24, 1);
            counter_begin(base + COUNTS_AT + i * 24 + 8, 4);
            counter_begin(base + COUNTS_AT + i * 24 + 16, 1);
        }
#endif
        SHOW_COUNTERS;
    }
#if CODED
    for (int i = threadIdx.x; i < 512; i += WARPS * 32) ((float*)(shared + LEVELS_AT))[i] = args.nf4[i / 32];
#endif
    __syncthreads();
#if CODED
    if (warp > COMPUTING + 2) return make_weights(args, base, (warp - COMPUTING - 3) / 4, (warp - COMPUTING - 3) % 4, lane);
#endif
    // Blocks that share W begin side by side.
    const int first_row = own % args.row_blocks * ROWS_HERE, first_output = own / args.row_blocks * OUTPUTS_WIDE;
    const int steps = (args.width + 127) / 128;
    Ring ring;
    if (warp == COMPUTING) {  // asks for weights, of which none is made by the kernel before
        if (lane) return;
#pragma unroll 1
        for (int n = 0; n < steps; ++n, ring.next(STAGES)) {
            const u32 counter = filled + ring.stage * 8, to = base + ring.stage * STAGE + 2 * X_HALF;
            if (n >= STAGES) counter_wait(emptied + ring.stage * 8, ring.phase ^ 1);
#if CODED
            if (is_coded(n, args.inputs)) {
                counter_arrive(counter);
                counter_arrive(base + COUNTS_AT + n * CODED / 8 % CODES * 24 + 16);
                continue;
            }
#endif
            counter_arrive_expecting(counter, 2 * W_HALF);
            bring_groups(to, args.w, n * 2, first_output, counter);
        }
        return;
    }
    if (warp == COMPUTING + 1) {  // asks for x
        if (lane) return;
#if CHAIN
        BEFORE_HAS_ENDED;
        NEXT_MAY_BEGIN;
#endif
#pragma unroll 1
        for (int n = 0; n < steps; ++n, ring.next(STAGES)) {
            const u32 counter = filled + ring.stage * 8;
            if (n >= STAGES) counter_wait(emptied + ring.stage * 8, ring.phase ^ 1);
            if (n == args.inputs / 128)
                for (int row = first_row; row < min(first_row + ROWS_HERE, args.rows); row += 64)
                    hear_of_low(args.flags + row / 64 * 32, (gridDim.x - low_blocks) / args.row_blocks);
            counter_arrive_expecting(counter, 2 * X_HALF);
            bring_groups(base + ring.stage * STAGE, args.xs, n * 2, first_row, counter);
        }
        return;
    }
#if CODED
    if (warp == COMPUTING + 2) {  // asks for codes, further ahead, as they take little room
        if (lane) return;
        const int coded = args.inputs / 128 * CODED / 8, bytes = min(OUTPUTS_WIDE, args.outputs - first_output) / 8 * EIGHT_CODES;
        const u8* from = args.codes + first_output / 8 * EIGHT_CODES;
#pragma unroll 1
        for (int i = 0; i < coded; ++i, ring.next(CODES), from += args.outputs / 8 * EIGHT_CODES) {
            const u32 counts = base + COUNTS_AT + ring.stage * 24;
            if (i >= CODES) counter_wait(counts + 8, ring.phase ^ 1);
            counter_arrive_expecting(counts, bytes);
            bring_bytes(base + CODES_AT + ring.stage * CODES_BYTES, from, bytes, counts);
        }
        return;
    }
#endif
    float c[OUTPUTS_WIDE / 2];
    clear(c);
    u32 before = 0;
#if CODED
    Ring made;
#endif
#pragma unroll 1
    for (int n = 0; n < steps; ++n, ring.next(STAGES)) {
        counter_wait(filled + ring.stage * 8, ring.phase);
#if CODED
        if (is_coded(n, args.inputs)) {
            counter_wait(base + MADE_AT + made.stage * 8, made.phase);
            made.next(STAGES);
        }
#endif
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
