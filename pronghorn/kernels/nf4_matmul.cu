// y = x [W_1; W_2; W_3]^T + low (s B)^T + bias for a handful of rows, weights read as NF4 codes, once.
// What the kernel is and why it is so: nf4_matmul.py. Compiled at run time behind instructions.cu, nf4_weights.cu (what it
// is given, codes to weights) and nf4_low.cu (x A^T), with these given:
//   GROUPS  groups of warps in a block, PAIR tiles of 8 outputs each, the last SHORT of them (with RING 1) one fewer
//   RING    warps of a group: 1, or more that take turns at the inputs of the same outputs
//   ROWS    rows of x: 8, or a multiple of 16                      PANEL   columns of x in a stage
//   STAGES  stages of x on their way or in use                     CHUNK   columns of a turn (256, with RING 128 too)
//   NESTED  scales are 8-bit codes (else float32)                  RANK16  16-column pieces of an adapter
//   F16     float16 in place of bfloat16
//   CHAIN   begins while the kernel before runs, which makes x, or with LOW 0 may make low alone (x is then whole)
//   LOW     1, 2, 4 blocks make low, where nobody else has (with ROWS 8), LOW_COLUMNS of x at a time; 0: it is given
//   PERMUTED  a bit for each of a chunk's tiles, inputs before outputs: whether its weights are looked up without memory

#define OUTPUTS ((GROUPS * PAIR - SHORT) * 8)  // of a block
#define WIDE (ROWS == 8 && PAIR % 2 == 0)  // outputs are the 16 rows of the instruction's left operand; else x is
#define SIXTEENS (ROWS == 8 ? 1 : ROWS / 16)
#define SUMS (WIDE ? PAIR / 2 : PAIR)    // accumulators of a thread, for each 16 rows
#define BLOCKS (CHUNK / 64)              // scales of a row in a chunk
#define STEPS (CHUNK / 16)
#define PANEL_CHUNKS (PANEL / CHUNK)
#define X_ROW (PANEL * 2 + 16)           // bytes: eight rows' 16 bytes lie in different banks
#define X_STAGE (ROWS * X_ROW)
#define CODES_BEHIND (RING == 1 && (ROWS == 16 || ROWS == 32))  // the next codes are asked for behind the products
#define COUNTERS 256                     // bytes: of arrivals, two for each stage, and one

template <int N>
struct Tiles {
    static constexpr int many = N;
};

// One step of 16 columns: k[p] are a thread's weights of tile p, x[n] its part of rows 16 n to 16 n + 15, in the
// instruction's order for a left operand (rows g, g + 8, and g, g + 8 again; columns 2 t and 2 t + 8 on).
__device__ __forceinline__ void step(float (*c)[SIXTEENS][4], const u32 (*k)[2], const u32 (*x)[4]) {
#if WIDE
#pragma unroll
    for (int p = 0; p < PAIR; p += 2) multiply(c[p / 2][0], k[p][0], k[p + 1][0], k[p][1], k[p + 1][1], x[0][0], x[0][2]);
#else
#pragma unroll
    for (int n = 0; n < SIXTEENS; ++n)
#pragma unroll
        for (int p = 0; p < PAIR; ++p) multiply(c[p][n], x[n][0], x[n][1], x[n][2], x[n][3], k[p][0], k[p][1]);
#endif
}
// x of as many steps as one instruction reads of eight rows, or of one. from: shared address of the lane's place in a
// stage, at the first step's column.
#define READ_STEPS (ROWS == 8 ? 2 : 1)
__device__ __forceinline__ void read_x(u32 (*x)[SIXTEENS][4], u32 from) {
#if ROWS == 8
    u32 v[4];
    read_pieces(v, from);
    x[0][0][0] = v[0], x[0][0][2] = v[1], x[1][0][0] = v[2], x[1][0][2] = v[3];
    x[0][0][1] = x[0][0][3] = x[1][0][1] = x[1][0][3] = 0;
#else
#pragma unroll
    for (int n = 0; n < SIXTEENS; ++n) read_pieces(x[0][n], from + n * 16 * X_ROW);
#endif
}

#if CHAIN && ROWS == 8
// Room for the kernel before, 8 warps of up to 48 registers (a norm) where outputs are many, and else 4: on the
// multiprocessors where its blocks are, a block of this one would otherwise begin only when they have ended. A quarter of
// 65536 is each fourth warp's. (With more rows there is no room in shared memory.)
#define MOST ((16384 - (WARPS > 8 ? 2 * 48 : 48) * 32) / ((WARPS + 3) / 4 * 32) / 8 * 8)
#define BOUNDS __maxnreg__(MOST < 248 ? MOST : 248)
#else
#define BOUNDS __launch_bounds__(WARPS * 32, 1)
#endif
extern "C" __global__ void BOUNDS nf4_matmul(const __grid_constant__ Args args) {
    // The same for all lanes, and the compiler sees it: what depends on it lies in uniform registers.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group = warp / RING, place = warp % RING;

#if LOW
    if (blockIdx.x < LOW) {
        make_low(args, warp, lane);
        return;
    }
#endif
    const bool shorter = SHORT && group >= GROUPS - SHORT;
    const int base = (group * PAIR - (shorter ? group - (GROUPS - SHORT) : 0)) * 8;  // where the group's outputs begin: here,
    int o0 = (blockIdx.x - LOW) * OUTPUTS + base, which = 0;                         // and in its member
    for (; which + 1 < args.members; ++which) {
        const int before = args.member[which].outputs;
        const int taken = args.joined ? before : (before + OUTPUTS - 1) / OUTPUTS * OUTPUTS;
        if (o0 - (args.joined ? 0 : base) < taken) break;
        o0 -= taken;
    }
#if CHAIN && !LOW
    NEXT_MAY_BEGIN;  // who begins early reads nothing of this, or of low, before this has ended
#endif
    const Member& own = args.member[which];
    const int K = args.K, chunks = K / CHUNK, blocks = K / 64, last = own.outputs - 8;
    const int first_row = blockIdx.y * ROWS, rows = min(args.rows - first_row, ROWS);
    const u16* const x_rows = args.x + (u64)first_row * args.x_stride;

    // A warp reads its tiles' codes straight into registers, 256 bytes at once, a chunk ahead. Past the last tile it
    // takes the last one again: what comes of it is not stored.
    const u8* codes[PAIR];
    uint2 w[PAIR][BLOCKS];
#pragma unroll
    for (int p = 0; p < PAIR; ++p) {
        codes[p] = own.codes + (u64)min(o0 + p * 8, last) * (K / 2) + lane * 8;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) w[p][b] = codes8(codes[p] + (min(place, chunks - 1) * BLOCKS + b) * 256);
    }
    // So are the scales of scales. Thread t of a quad makes the scales of block t of a chunk.
    float nested[PAIR];
    auto read_nested = [&](int chunk) {
#pragma unroll
        for (int p = 0; p < PAIR; ++p) {
            const u32 at = (u32)(min(o0 + p * 8, last) + g) * blocks + chunk * BLOCKS + t % BLOCKS;
            nested[p] = NESTED ? __ldg(own.nested + (at >> 8)) : 0.0f;
        }
    };
    read_nested(min(place, chunks - 1));
#if RANK16
    if (own.b != 0)  // needed at the very end, and then at once
#pragma unroll
        for (int p = 0; p < PAIR; ++p) FETCH_TO_L2(own.b + (u64)(min(o0 + p * 8, last) + g) * own.rank);
#endif
    const float level = args.nf4[lane % 16], offset = NESTED ? __ldg(own.offset) : 0.0f;

    float* const levels = (float*)(shared + TABLE);       // 256
    u8* const scales = shared + TABLE + LEVELS;           // [OUTPUTS, blocks]
    const int scale_row = blocks * (NESTED ? 1 : 4);      // bytes, a multiple of 4
    u8* const rest = scales + (OUTPUTS * scale_row + 127) / 128 * 128;
    // All scales of the group's outputs at once (a 32nd of its codes), on their way while the rest of the start is made.
    const int scale_bytes = min((PAIR - shorter) * 8, own.outputs - o0) * scale_row;
    for (int i = (place * 32 + lane) * 16; i < scale_bytes; i += RING * 512)
        copy16(shared_address(scales) + base * scale_row + i, (const u8*)own.scales + (u64)o0 * scale_row + i);
    COPIES_END;
    const int panels = (K + PANEL - 1) / PANEL;
    const u32 x_stages = shared_address(rest) + COUNTERS;
    // Each warp copies a part of a panel, and not what x has not: rows that are not there are columns of nothing that is
    // stored.
    auto copy_panel = [&](int panel) {
        const u32 to = x_stages + panel % STAGES * X_STAGE;
        const int columns = min(PANEL, K - panel * PANEL);
#pragma unroll 1
        for (int row = warp; row < rows; row += WARPS)
            for (int column = lane * 8; column < columns; column += 256)
                copy16(to + row * X_ROW + column * 2, x_rows + (u64)row * args.x_stride + panel * PANEL + column);
    };
#if LOW
    const u32 low_is_there = shared_address(rest) + 128;
#endif
#if RING == 1
    auto load_x = [&](int panel) {
        if (panel < panels) copy_panel(panel);
        COPIES_END;
    };
    auto begin_x = [&] {
        load_x(0);
#pragma unroll
        for (int s = 1; s < STAGES - 1; ++s) load_x(s);
    };
#else
    // Warps that take turns are at different panels, so there is no point at which all could meet: a stage's counters
    // say when all of it is there, and when all have read it.
    const u32 filled = shared_address(rest), emptied = filled + 64;
    if (threadIdx.x < STAGES) {
        counter_begin(filled + threadIdx.x * 8, WARPS * 32);
        counter_begin(emptied + threadIdx.x * 8, WARPS);
    }
#if LOW
    if (threadIdx.x == 0) counter_begin(low_is_there, 1);
#endif
    __syncthreads();
    // One stage less is filled ahead where they are filled again: who asks for that then has others to wait for that
    // are a panel behind, not a chunk.
    int loaded = 0, left = 0;
    const int ahead = panels > STAGES ? STAGES - 1 : STAGES;
    auto load_until = [&](int end) {
#pragma unroll 1
        for (; loaded < min(end, panels); ++loaded) {
            if (loaded >= STAGES) counter_wait(emptied + loaded % STAGES * 8, (loaded / STAGES - 1) & 1);
            copy_panel(loaded);
            counter_arrive_with_copies(filled + loaded % STAGES * 8);
        }
    };
    // This warp reads no panel before `next` any more. It says so of none before it has filled that one's stage: until
    // then the stage's counter may be counting for the panel before.
    auto leave_panels = [&](int next) {
#pragma unroll 1
        for (; left < next; ++left) {
            load_until(left + 1);
            if (left + STAGES < panels && lane == 0) counter_arrive(emptied + left % STAGES * 8);
        }
        load_until(next + ahead);
    };
    auto begin_x = [&] { load_until(ahead); };
#endif
#if !(CHAIN && LOW)
    begin_x();
#endif
    copy_levels(own);
    make_table(level);
#if LOW && RING == 1
    if (threadIdx.x == 0) counter_begin(low_is_there, 1);
#endif
#if CHAIN && LOW
    BEFORE_HAS_ENDED;  // it makes x
    NEXT_MAY_BEGIN;
    COPIES_WAIT(0);  // scales
    __syncthreads();
    begin_x();
#endif
    u32 column = lane % 16 * 8;
    KEEP(column);  // as it is, so that an address is one instruction
    float c[SUMS][SIXTEENS][4] = {};
    float scale[PAIR];
    auto make_scales = [&](int chunk) {
#pragma unroll
        for (int p = 0; p < PAIR; ++p) {
            const u8* const row = scales + (base + p * 8 + g) * scale_row;
            const int block = chunk * BLOCKS + t % BLOCKS;
            scale[p] = NESTED ? __fadd_rn(__fmul_rn(levels[row[block]], nested[p]), offset) : ((const float*)row)[block];
        }
    };
    auto read_codes = [&](int p, int b, u32 ahead) { w[p][b] = codes8(codes[p] + (ahead + b) * 256); };
    // A thread's weights of four steps of one tile; its codes are replaced by those of the block `ahead`. With more rows that
    // is done behind the products: asked for here they come to other registers, to be moved, of which there are few then.
    auto make_block = [&](u32 (*k)[2], int p, int b, u32 ahead) {
        const float s = of_quad(scale[p], b);
        const uint2 v = w[p][b];
        if (!CODES_BEHIND) read_codes(p, b, ahead);
#if PERMUTED
        if (PERMUTED >> (b * PAIR + p) & 1) {
            const Values values = values_of(args, s);
            permuted(k, 0, values, v.x), permuted(k, 1, values, v.y);
            return;
        }
#endif
#pragma unroll
        for (int q = 0; q < 4; ++q) k[q * PAIR][0] = weights(v.x, q, column, s), k[q * PAIR][1] = weights(v.y, q, column, s);
    };
    // The adapter's B is read ahead of the last products, where nothing is left to hide it behind.
#if RANK16
    u32 up[RANK16][PAIR][2];
    auto read_up = [&] {
        if (own.b != 0)
#pragma unroll
            for (int r = 0; r < RANK16; ++r)
#pragma unroll
                for (int p = 0; p < PAIR; ++p) {
                    const u32* const from = (const u32*)(own.b + (u64)(min(o0 + p * 8, last) + g) * own.rank + r * 16 + t * 2);
                    up[r][p][0] = r * 16 < own.rank ? __ldg(from) : 0, up[r][p][1] = r * 16 < own.rank ? __ldg(from + 4) : 0;
                }
    };
#else
    auto read_up = [] {};
#endif
    // Where in a stage a lane reads x: ldmatrix takes an address of a row from each.
    const int x_place = ROWS == 8 ? lane % 8 * X_ROW + lane / 8 * 16 : lane % 16 * X_ROW + lane / 16 * 16;
#if RING > 1
#if !(CHAIN && LOW)
    COPIES_WAIT(0);  // scales; copies of x are in no group
    __syncthreads();
#endif
    // A chunk's operands are made by one warp while others make theirs; only the products wait for their turn, with the
    // accumulators handed from warp to warp, so that each sum is in order.
    float4* const handed = (float4*)(rest + COUNTERS + STAGES * X_STAGE) + group * RING * SUMS * SIXTEENS * 32;
    const int once = min(args.rows, 1);
    leave_panels(min(place / PANEL_CHUNKS, panels));  // which may have others to wait for
#pragma unroll 1
    for (int chunk = place; chunk < chunks; chunk += RING) {
        make_scales(chunk);
        read_nested(min(chunk + RING, chunks - 1));
        const u32 fetched = min(chunk + RING, chunks - 1) * BLOCKS;
        u32 k[STEPS][PAIR][2];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int p = 0; p < PAIR; ++p) make_block(&k[b * 4][p], p, b, fetched);
        if (chunk + 1 == chunks) read_up();
        const int panel = chunk / PANEL_CHUNKS;
        const u32 x_at = x_stages + panel % STAGES * X_STAGE + chunk % PANEL_CHUNKS * (CHUNK * 2) + x_place;
        counter_wait(filled + panel % STAGES * 8, panel / STAGES & 1);
#if ROWS == 8
        u32 x[STEPS][1][4];
#pragma unroll
        for (int j = 0; j < STEPS; j += 2) read_x(&x[j], x_at + j * 32);
#endif
        // A loop of one round, of which the compiler does not know that it is one: it would move the making of operands
        // in between the products, where all other warps wait for it.
#pragma unroll 1
        for (int i = 0; i < once; ++i) {
            if (chunk > 0) {
                TURN_WAIT((1 + warp) % 16);
#pragma unroll
                for (int m = 0; m < SUMS * SIXTEENS; ++m) {
                    const float4 v = handed[(place * SUMS * SIXTEENS + m) * 32 + lane];
                    float* const own_c = c[m / SIXTEENS][m % SIXTEENS];
                    own_c[0] = v.x, own_c[1] = v.y, own_c[2] = v.z, own_c[3] = v.w;
                }
            }
#pragma unroll
            for (int j = 0; j < STEPS; ++j) {
#if ROWS == 8
                step(c, k[j], x[j]);
#else
                u32 x[1][SIXTEENS][4];
                read_x(x, x_at + j * 32);
                step(c, k[j], x[0]);
#endif
            }
            if (chunk + 1 < chunks) {
                const int next = (place + 1) % RING;
#pragma unroll
                for (int m = 0; m < SUMS * SIXTEENS; ++m) {
                    const float* const own_c = c[m / SIXTEENS][m % SIXTEENS];
                    handed[(next * SUMS * SIXTEENS + m) * 32 + lane] = make_float4(own_c[0], own_c[1], own_c[2], own_c[3]);
                }
                TURN_GIVE((1 + group * RING + next) % 16);
            }
        }
        __syncwarp();  // all have read x
        leave_panels(chunk + RING < chunks ? (chunk + RING) / PANEL_CHUNKS : panels);
    }
    if ((chunks - 1) % RING != place) {  // the sums are whole with who had the last turn
        ALL_COPIES_WAIT;
#if LOW
        if (warp == chunks % RING && lane == 0) listen(args, low_is_there);  // of the first group, who is not the last
#endif
        return;
    }
#else
    read_up();
    // Twice in the code where some warps have a tile fewer: asking at each block would keep loads from being in flight.
    // The barrier within is one, as it counts warps wherever in the code they are (PTX, barrier.sync).
    auto sum_up = [&](auto tiles) {
        int chunk = 0;
#pragma unroll 1
        for (int panel = 0; panel < panels; ++panel) {
            COPIES_WAIT(STAGES > 1 ? STAGES - 2 : 0);
            __syncthreads();
            if (STAGES > 1) load_x(panel + STAGES - 1);
            const int until = min(chunks, (panel + 1) * PANEL_CHUNKS);
            u32 x_at = x_stages + panel % STAGES * X_STAGE + x_place;
#pragma unroll 1
            for (; chunk < until; ++chunk, x_at += CHUNK * 2) {
                const int next = min(chunk + 1, chunks - 1);
                make_scales(chunk);
                read_nested(next);
#pragma unroll
                for (int b = 0; b < BLOCKS; ++b) {
                    u32 k[4][PAIR][2] = {};
#pragma unroll
                    for (int p = 0; p < tiles.many; ++p) make_block(&k[0][p], p, b, next * BLOCKS);
#pragma unroll
                    for (int q = 0; q < 4; q += READ_STEPS) {
                        u32 x[READ_STEPS][SIXTEENS][4];
                        read_x(x, x_at + (b * 4 + q) * 32);
#pragma unroll
                        for (int i = 0; i < READ_STEPS; ++i) step(c, k[q + i], x[i]);
                    }
                    if (CODES_BEHIND)
#pragma unroll
                        for (int p = 0; p < tiles.many; ++p) read_codes(p, b, next * BLOCKS);
                }
            }
        }
    };
    if (shorter)
        sum_up(Tiles<PAIR - 1>());
    else
        sum_up(Tiles<PAIR>());
#endif

#if LOW
#if RING == 1
    if (warp == WARPS - 1) {  // which ends early where some do
        if (lane == 0) listen(args, low_is_there);
        __syncwarp();
    }
#endif
    counter_wait(low_is_there, 0);
#elif CHAIN
    BEFORE_HAS_ENDED;  // it makes low
#endif
#if RANK16
    if (own.b != 0) {
#pragma unroll
        for (int r = 0; r < RANK16; ++r) {
            u32 low[SIXTEENS][4] = {};
#pragma unroll
            for (int n = 0; n < SIXTEENS; ++n)
#pragma unroll
                for (int h = 0; h < (ROWS == 8 ? 1 : 2); ++h) {
                    const int row = n * 16 + h * 8 + g;
                    if (r * 16 < own.rank && row < rows) {
                        const u16* const of_row = args.low + (u64)(first_row + row) * args.low_stride + own.at + r * 16 + t * 2;
                        low[n][h] = low_pair(of_row), low[n][2 + h] = low_pair(of_row + 8);
                    }
                }
            step(c, up[r], low);
        }
    }
#endif
    auto store = [&](float y, int row, int o) {
        if (row >= rows) return;
        if (own.bias) y = __fadd_rn(wide((u16)pair(y, 0.0f)), wide(own.bias[o]));  // as cuBLAS: two roundings
        args.y[(u64)(first_row + row) * args.y_stride + own.column + o] = (u16)pair(y, 0.0f);
    };
#pragma unroll
    for (int p = 0; p < PAIR; ++p) {
        if (o0 + p * 8 > last || (shorter && p + 1 == PAIR)) break;
#pragma unroll
        for (int n = 0; n < SIXTEENS; ++n)
#pragma unroll
            for (int i = 0; i < (ROWS == 8 ? 2 : 4); ++i)
                if (WIDE)
                    store(c[p / 2][0][p % 2 * 2 + i], t * 2 + i, o0 + p * 8 + g);
                else
                    store(c[p][n][i], n * 16 + i / 2 * 8 + g, o0 + p * 8 + t * 2 + i % 2);
    }
}
