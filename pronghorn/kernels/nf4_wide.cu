// y = x [W_1; W_2; W_3]^T + low (s B)^T + bias for 17 to 64 rows and many outputs, weights read as NF4 codes, once. What the
// kernel is and why it is so: nf4_wide_cuda.py. Compiled at run time behind instructions.cu, nf4_weights.cu and
// low_blocks.cu, with these given, and what the latter says:
//   GROUPS  warps in a block, four by four, 16 outputs each (PAIR 2, RING 1)      ROWS    rows of x: 32 or 64
//   IDLE    of the warps, the last ones: without outputs                          NESTED, RANK16, F16: as in nf4_matmul.cu
//   STAGES  of SPAN (1, 2 or 4) times 64 columns of x and codes in shared memory; three of them, or with SPAN 4 two
//   CHAIN   begins while the kernel before runs, which makes low alone (x is whole), or, if LOW, x

#define WORKING (GROUPS - IDLE)
#define OUTPUTS (WORKING * 16)
#define EIGHTS (ROWS / 8)
#define X_BLOCK (ROWS * 128)                        // bytes: 64 columns of all rows
#define CODES_ROW (SPAN * 256)                      // bytes: a stage's codes of 8 outputs
#define STAGE_BYTES (SPAN * X_BLOCK + WORKING * PAIR * CODES_ROW)
#define STAGE ((STAGE_BYTES + 1023) / 1024 * 1024)  // x first
#define Y_ROW (OUTPUTS * 2 + 16)

#if STAGES < 3 && SPAN < 4
#error who fills a stage waits for it before it does so
#endif
#if LOW && GROUPS < 8
#error who asks for a stage of x and A is another warp than those that multiply it
#endif

struct WideArgs {
    Map x, low;    // in blocks of ROWS rows
    Map codes[3];  // of each member, as 32-bit numbers, a row 8 outputs: in blocks of WORKING PAIR rows, SPAN 64 columns
    Map a;         // if LOW: in blocks of RANKS rows
    Args args;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) nf4_wide(const __grid_constant__ WideArgs given) {
    const Args& args = given.args;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#if LOW
    u32* const low_flag = (u32*)args.counts;
    if (blockIdx.x < LOW) {
        const int columns = (args.ranks + 15) / 16 * 16;  // of low: those beyond A's are zeros
        const Low low = {args.low, args.parts, low_flag, args.low_stride, args.rows, columns, args.K};
        if (make_low(low, given.x, given.a, 0, blockIdx.x, warp, lane)) tell_of_low(low);
        return;
    }
#endif
    int tile = (int)blockIdx.x - LOW, which = 0;
    for (; which + 1 < args.members; ++which) {
        const int tiles = (args.member[which].outputs + OUTPUTS - 1) / OUTPUTS;
        if (tile < tiles) break;
        tile -= tiles;
    }
#if CHAIN && !LOW
    NEXT_MAY_BEGIN;  // who begins early reads nothing of this, or of low, before this has ended
#endif
    const Member& own = args.member[which];
    const int K = args.K, blocks = K / 64, chunks = K / 256, last = own.outputs - 8, first_output = tile * OUTPUTS;
    const int stages = blocks / SPAN, steps = stages + (RANK16 && own.b != 0 ? 1 : 0);  // the adapter's is the last
    // The last IDLE warps have no outputs: the wide instruction is four warps', whose other rows nobody stores.
    const bool works = warp < WORKING;
    const int base = works ? warp * 16 : 0, o0 = first_output + base;

    float* const levels = (float*)(shared + TABLE);
    u8* const scales = shared + TABLE + LEVELS;        // [OUTPUTS, blocks]
    const int scale_row = blocks * (NESTED ? 1 : 4);  // bytes
    // An odd number of 16 bytes apart, where they are as many: eight rows lie in different banks.
    const int scale_place = scale_row + (scale_row / 16 % 2 ? 0 : 16);
    const u32 filled = shared_address(scales) + (OUTPUTS * scale_place + 127) / 128 * 128, emptied = filled + STAGES * 8;
    const u32 ring = (emptied + STAGES * 8 + 1023) / 1024 * 1024;  // as the host counts it: `shared` begins at such a place
    auto ask_codes = [&](int i) {
        const u32 counter = filled + i % STAGES * 8;
        counter_arrive_expecting(counter, STAGE_BYTES);
        bring(ring + i % STAGES * STAGE + SPAN * X_BLOCK, given.codes[which], i * CODES_ROW / 4, first_output / 8, counter);
    };
    auto ask_x = [&](int i) {
#pragma unroll
        for (int b = 0; b < SPAN; ++b)
            bring(ring + i % STAGES * STAGE + b * X_BLOCK, given.x, (i * SPAN + b) * 64, 0, filled + i % STAGES * 8);
    };
    auto fill = [&](int i) {  // by one thread: the engine counts bytes, so nobody else has to wait and tell
        const int stage = i % STAGES;
        const u32 counter = filled + stage * 8;
        if (i >= STAGES) counter_wait(emptied + stage * 8, (i / STAGES - 1) & 1);
        if (i < stages) {
            ask_codes(i);
            ask_x(i);
        } else {
            counter_arrive_expecting(counter, X_BLOCK);
#if LOW
            hear_of_low(low_flag, gridDim.x - LOW);
#elif CHAIN
            BEFORE_HAS_ENDED;  // it makes low
#endif
            bring(ring + stage * STAGE, given.low, own.at, 0, counter);
        }
    };
    const bool fills = threadIdx.x == (WARPS - 1) * 32;
    if (fills) {
#pragma unroll 1
        for (int i = 0; i < STAGES; ++i) {
            counter_begin(filled + i * 8, 1);
            counter_begin(emptied + i * 8, WARPS);
        }
        SHOW_COUNTERS;
#pragma unroll 1
        for (int i = 0; i < min(STAGES - 1, LOW ? stages : steps); ++i)
            if (LOW) ask_codes(i);
            else fill(i);
    }
    __syncwarp();

    const int scale_rows = works ? min(PAIR * 8, own.outputs - o0) : 0;
    const int piece = scale_row % 16 ? 4 : 16, pieces = scale_row / piece;
    for (int i = lane; i < scale_rows * pieces; i += 32) {
        const int row = i / pieces, at = i % pieces * piece;
        const u32 to = shared_address(scales) + (base + row) * scale_place + at;
        const u8* const from = (const u8*)own.scales + (u64)(o0 + row) * scale_row + at;
        if (piece == 16)
            copy16(to, from);
        else
            copy4(to, from);
    }
    COPIES_END;
    float nested[PAIR], scale[PAIR];
    auto read_nested = [&](int chunk) {
#pragma unroll
        for (int p = 0; p < PAIR; ++p) {
            const u32 at = (u32)(min(o0 + p * 8, last) + g) * blocks + min(chunk, chunks - 1) * 4 + t;
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
#if LOW
    if (fills) {
#if CHAIN
        BEFORE_HAS_ENDED;  // it makes x
        NEXT_MAY_BEGIN;
#endif
        for (int i = 0; i < min(STAGES - 1, stages); ++i) ask_x(i);
        if (stages < min(STAGES - 1, steps)) fill(stages);
    }
    __syncwarp();
#endif
    COPIES_WAIT(0);
    __syncthreads();
    auto make_scales = [&](int chunk) {
#pragma unroll
        for (int p = 0; p < PAIR; ++p) {
            const u8* const row = scales + (base + p * 8 + g) * scale_place;
            const int block = min(chunk, chunks - 1) * 4 + t;
            scale[p] = NESTED ? __fadd_rn(__fmul_rn(levels[row[block]], nested[p]), offset) : ((const float*)row)[block];
        }
    };
    make_scales(0);
    read_nested(1);

    int place = 0, parity = 0;  // of the stage in use
    const u32 first_x = described(ring);
    const u8* const first_codes = shared + (ring - shared_address(shared)) + SPAN * X_BLOCK + base / 8 * CODES_ROW + lane * 8;
    counter_wait(filled, 0);
    uint2 v[PAIR];
#pragma unroll
    for (int p = 0; p < PAIR; ++p) v[p] = *(const uint2*)(first_codes + p * CODES_ROW);
    // Products read registers until they are waited for, of which the compiler knows nothing: without a use behind the wait
    // it may make other things in them.
    auto keep = [](u32 (*own_k)[PAIR][2]) {
#pragma unroll
        for (int i = 0; i < 4 * PAIR * 2; ++i) KEEP(own_k[i / (PAIR * 2)][i / 2 % PAIR][i % 2]);
    };
    u32 k[2][4][PAIR][2] = {};  // of two blocks: products read one's while the other's are made
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            const int stage = chunk * (4 / SPAN) + b / SPAN;
            const u32 x = first_x + (place * STAGE + b % SPAN * X_BLOCK) / 16;
            const int before = place == 0 ? STAGES - 1 : place - 1;
            u32 ready = 1;
            if (b % SPAN == SPAN - 1) {
                if (++place == STAGES) place = 0, parity ^= 1;
                ready = counter_ended(filled + place * 8, parity);  // asked here, as the answer takes a while
            }
            u32(*const own_k)[PAIR][2] = k[b % 2];
            if (works) {
#pragma unroll
                for (int p = 0; p < PAIR; ++p) {
                    const float s = of_quad(scale[p], b);
#pragma unroll
                    for (int q = 0; q < 4; ++q)
                        own_k[q][p][0] = weights(v[p].x, q, column, s), own_k[q][p][1] = weights(v[p].y, q, column, s);
                }
                if (b == 3) {
                    make_scales(chunk + 1);
                    read_nested(chunk + 2);
                }
            }
            if (!ready && stage + 1 < stages) counter_wait(filled + place * 8, parity);
#pragma unroll
            for (int p = 0; p < PAIR; ++p)
                v[p] = *(const uint2*)(first_codes + place * STAGE + (b + 1) % SPAN * 256 + p * CODES_ROW);
            MULTIPLIES_BEGIN;
#pragma unroll
            for (int q = 0; q < 4; ++q)
                multiply_wide(c, own_k[q][0][0], own_k[q][1][0], own_k[q][0][1], own_k[q][1][1], x + q * 2);
            MULTIPLIES_END;
            MULTIPLIES_WAIT(1);  // of the block before: its registers are free, and so is x of its stage
            keep(k[(b + 1) % 2]);
            if (b % SPAN == 0 && stage > 0 && lane == 0) counter_arrive(emptied + before * 8);
            if (b % SPAN == SPAN / 2) {  // by now all have read it
                if (fills && stage + STAGES - 1 < steps) fill(stage + STAGES - 1);
                __syncwarp();
            }
        }
    }
#if CHAIN
    BEFORE_HAS_ENDED;  // so that who waits for this waits for it, too
#endif
#if RANK16
    if (steps > stages) {  // all ranks are equal: not to ask at each product, which would keep them from overlapping
        u32 up[RANK16][PAIR][2];
#pragma unroll
        for (int q = 0; q < RANK16; ++q)
#pragma unroll
            for (int p = 0; p < PAIR; ++p) {
                const u32* const from = (const u32*)(own.b + (u64)(min(o0 + p * 8, last) + g) * own.rank + q * 16 + t * 2);
                up[q][p][0] = __ldg(from), up[q][p][1] = __ldg(from + 4);
            }
        counter_wait(filled + place * 8, parity);
        const u32 x = first_x + place * STAGE / 16;
        MULTIPLIES_BEGIN;
#pragma unroll
        for (int q = 0; q < RANK16; ++q)
            multiply_wide(c, up[q][0][0], up[q][1][0], up[q][0][1], up[q][1][1], x + q * 2);
        MULTIPLIES_END;
    }
#endif
    MULTIPLIES_WAIT(0);
    keep(k[1]);
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) KEEP_FLOAT(c[j][i]);  // not to be read before
#if LOW
    if (fills && steps == stages) hear_of_low(low_flag, gridDim.x - LOW);  // without an adapter, for the flag's sake
#endif
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
        if (works) write_pieces_turned(to, y[0], y[1], y[2], y[3]);
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
