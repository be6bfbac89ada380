// y = x [W_1; W_2; W_3]^T + low (s B)^T + bias for 17 to 64 rows and many outputs, weights read as NF4 codes, once. What the
// kernel is and why it is so: nf4_wide_cuda.py. Compiled at run time behind instructions.cu and nf4_weights.cu, with:
//   GROUPS  warps in a block, four by four, 16 outputs each (PAIR 2, RING 1)      ROWS    rows of x: 32 or 64
//   STAGES  of 256 columns (a chunk) of x in shared memory                        NESTED, RANK16, F16: as in nf4_matmul.cu
//   CHAIN   begins while the kernel before runs, which makes low alone (x is whole)

#define OUTPUTS (GROUPS * 16)
#define EIGHTS (ROWS / 8)
#define X_BLOCK (ROWS * 128)  // bytes: 64 columns of all rows
#define STAGE (4 * X_BLOCK)
#define Y_ROW (OUTPUTS * 2 + 16)

struct WideArgs {
    Map x, low;  // in blocks of ROWS rows
    Args args;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) nf4_wide(const __grid_constant__ WideArgs given) {
    const Args& args = given.args;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int tile = blockIdx.x, which = 0;
    for (; which + 1 < args.members; ++which) {
        const int tiles = (args.member[which].outputs + OUTPUTS - 1) / OUTPUTS;
        if (tile < tiles) break;
        tile -= tiles;
    }
#if CHAIN
    NEXT_MAY_BEGIN;  // who begins early reads nothing of this, or of low, before this has ended
#endif
    const Member& own = args.member[which];
    const int K = args.K, blocks = K / 64, chunks = K / 256, last = own.outputs - 8, first_output = tile * OUTPUTS;
    const int steps = chunks + (RANK16 && own.b != 0 ? 1 : 0);  // stages in all, the adapter's the last

    float* const levels = (float*)(shared + TABLE);
    u8* const scales = shared + TABLE + LEVELS;       // [OUTPUTS, blocks]
    const int scale_row = blocks * (NESTED ? 1 : 4);  // bytes
    const u32 filled = shared_address(scales) + (OUTPUTS * scale_row + 127) / 128 * 128, emptied = filled + STAGES * 8;
    const u32 ring = (emptied + STAGES * 8 + 1023) / 1024 * 1024;  // as the host counts it: `shared` begins at such a place
    auto fill = [&](int i) {  // by one thread: the engine counts bytes, so nobody else has to wait and tell
        const int stage = i % STAGES;
        const u32 counter = filled + stage * 8;
        if (i >= STAGES) counter_wait(emptied + stage * 8, (i / STAGES - 1) & 1);
        const u32 to = ring + stage * STAGE;
        if (i < chunks) {
            counter_arrive_expecting(counter, STAGE);
#pragma unroll
            for (int b = 0; b < 4; ++b) bring(to + b * X_BLOCK, given.x, i * 256 + b * 64, 0, counter);
        } else {
            counter_arrive_expecting(counter, X_BLOCK);
#if CHAIN
            BEFORE_HAS_ENDED;  // it makes low
#endif
            bring(to, given.low, own.at, 0, counter);
        }
    };
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < STAGES; ++i) {
            counter_begin(filled + i * 8, 1);
            counter_begin(emptied + i * 8, WARPS);
        }
        SHOW_COUNTERS;
#pragma unroll 1
        for (int i = 0; i < min(STAGES - 1, steps); ++i) fill(i);
    }
    __syncwarp();

    const int base = warp * 16, o0 = first_output + base;
    const u8* codes[PAIR];
    uint2 w[PAIR][4];
#pragma unroll
    for (int p = 0; p < PAIR; ++p) {
        codes[p] = own.codes + (u64)min(o0 + p * 8, last) * (K / 2) + lane * 8;
#pragma unroll
        for (int b = 0; b < 4; ++b) w[p][b] = codes8(codes[p] + b * 256);
    }
    const int scale_bytes = min(PAIR * 8, own.outputs - o0) * scale_row;
    for (int i = lane * 16; i < scale_bytes; i += 512)
        copy16(shared_address(scales) + base * scale_row + i, (const u8*)own.scales + (u64)o0 * scale_row + i);
    COPIES_END;
    float nested[PAIR], scale[PAIR];
    auto read_nested = [&](int chunk) {
#pragma unroll
        for (int p = 0; p < PAIR; ++p) {
            const u32 at = (u32)(min(o0 + p * 8, last) + g) * blocks + chunk * 4 + t;
            nested[p] = NESTED ? __ldg(own.nested + (at >> 8)) : 0.0f;
        }
    };
    read_nested(0);
#if RANK16
    if (own.b != 0)
#pragma unroll
        for (int p = 0; p < PAIR; ++p) FETCH_TO_L2(own.b + (u64)(min(o0 + p * 8, last) + g) * own.rank);
#endif
    const float offset = NESTED ? __ldg(own.offset) : 0.0f;
    copy_levels(own);
    make_table(args.nf4[lane % 16]);
    u32 column = lane % 16 * 8;
    KEEP(column);
    float c[EIGHTS][4] = {};
    COPIES_WAIT(0);
    __syncthreads();

#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int stage = chunk % STAGES, next = min(chunk + 1, chunks - 1);
#pragma unroll
        for (int p = 0; p < PAIR; ++p) {
            const u8* const row = scales + (base + p * 8 + g) * scale_row;
            const int block = chunk * 4 + t;
            scale[p] = NESTED ? __fadd_rn(__fmul_rn(levels[row[block]], nested[p]), offset) : ((const float*)row)[block];
        }
        read_nested(next);
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            u32 k[4][PAIR][2];
#pragma unroll
            for (int p = 0; p < PAIR; ++p) {
                const float s = of_quad(scale[p], b);
                const uint2 v = w[p][b];
#pragma unroll
                for (int q = 0; q < 4; ++q) k[q][p][0] = weights(v.x, q, column, s), k[q][p][1] = weights(v.y, q, column, s);
            }
            if (b == 0) counter_wait(filled + stage * 8, chunk / STAGES & 1);
            const u32 x = ring + stage * STAGE + b * X_BLOCK;
            MULTIPLIES_BEGIN;
#pragma unroll
            for (int q = 0; q < 4; ++q) multiply_wide(c, k[q][0][0], k[q][1][0], k[q][0][1], k[q][1][1], described(x + q * 32));
            MULTIPLIES_END;
            // The next codes, into the registers of those just used: asked for any earlier they would come to others, and be
            // waited for here to be moved.
#pragma unroll
            for (int p = 0; p < PAIR; ++p) w[p][b] = codes8(codes[p] + (next * 4 + b) * 256);
            MULTIPLIES_WAIT(1);  // of the block before: its registers are free, and so is x of its chunk
            if (b == 0 && chunk > 0 && lane == 0) counter_arrive(emptied + (chunk - 1) % STAGES * 8);
            if (b == 2) {  // by now all have read it
                if (threadIdx.x == 0 && chunk + STAGES - 1 < steps) fill(chunk + STAGES - 1);
                __syncwarp();
            }
        }
    }
#if CHAIN
    BEFORE_HAS_ENDED;  // so that who waits for this waits for it, too
#endif
#if RANK16
    if (steps > chunks) {  // all ranks are equal: not to ask at each product, which would keep them from overlapping
        u32 up[RANK16][PAIR][2];
#pragma unroll
        for (int q = 0; q < RANK16; ++q)
#pragma unroll
            for (int p = 0; p < PAIR; ++p) {
                const u32* const from = (const u32*)(own.b + (u64)(min(o0 + p * 8, last) + g) * own.rank + q * 16 + t * 2);
                up[q][p][0] = __ldg(from), up[q][p][1] = __ldg(from + 4);
            }
        counter_wait(filled + chunks % STAGES * 8, chunks / STAGES & 1);
        const u32 x = ring + chunks % STAGES * STAGE;
        MULTIPLIES_BEGIN;
#pragma unroll
        for (int q = 0; q < RANK16; ++q)
            multiply_wide(c, up[q][0][0], up[q][1][0], up[q][0][1], up[q][1][1], described(x + q * 32));
        MULTIPLIES_END;
    }
#endif
    MULTIPLIES_WAIT(0);
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) KEEP_FLOAT(c[j][i]);  // not to be read before
    // Through shared memory, so that a row's outputs are written side by side: a thread has them of two rows.
    __syncthreads();  // no product reads x any more
    auto rounded = [&](float y, int o) {
        if (own.bias) y = __fadd_rn(wide((u16)pair(y, 0.0f)), wide(own.bias[min(o, last + 7)]));  // as cuBLAS: two roundings
        return y;
    };
#pragma unroll
    for (int j = 0; j < EIGHTS; j += 2) {
        u32 y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int o = o0 + i % 2 * 8 + g;
            const float* const of = c[j + i / 2] + i % 2 * 2;
            y[i] = pair(rounded(of[0], o), rounded(of[1], o));
        }
        const u32 to = ring + (j * 8 + lane / 16 * 8 + lane % 8) * Y_ROW + (base + lane / 8 % 2 * 8) * 2;
        write_pieces_turned(to, y[0], y[1], y[2], y[3]);
    }
    __syncthreads();
    const u8* const made = shared + (ring - shared_address(shared));
    const int eights = (own.outputs - first_output) / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < args.rows * (OUTPUTS / 8); i += WARPS * 32) {
        const int row = i / (OUTPUTS / 8), eight = i % (OUTPUTS / 8);
        if (eight < eights)
            *(float4*)(args.y + (u64)row * args.y_stride + own.column + first_output + eight * 8) =
                *(const float4*)(made + row * Y_ROW + eight * 16);
    }
}
