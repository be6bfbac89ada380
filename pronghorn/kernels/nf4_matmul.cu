// y = x [W_1; W_2; W_3]^T + low (s B)^T + bias for a handful of rows, weights read as NF4 codes, once.
// What the kernel is and why it is so: nf4_matmul.py. Compiled at run time, with these given:
//   WARPS   warps of a block                                       TILES  tiles of 8 rows of x
//   RING    1: the warps of a block take turns at the same 16 outputs; 0: each has 16 outputs of its own
//   CHUNK   columns of one stage (128 or 256)                      STAGES stages on their way or in use
//   NESTED  scales are 8-bit codes (else float32)                  RANK16 16-column pieces of an adapter
//   F16     float16 in place of bfloat16                           BLOCKS_PER_SM  that registers must suffice for
//   OVERLAP begins while the kernel before runs, which makes low, and nothing else that is read here

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Member {
    const u8* codes;        // [outputs, K / 2], first weight of a byte in its high nibble
    const void* scales;     // a scale for each 64 weights: u8 codes if NESTED, else float
    const float* nested;    // a scale for each 256 scale codes
    const float* offset;    // added to every scale
    const float* levels;    // the 256 levels of a scale code
    const u16* b;           // s B, [outputs, rank]; null without an adapter
    const u16* bias;        // null without one
    int outputs, column;    // outputs of this member, and the column of y where they begin
    int at, rank;           // the adapter's columns of low
};

struct Args {
    Member member[3];
    const u16* x;
    const u16* low;
    u16* y;
    const float* nf4;       // the 16 levels of a weight code
    int members, rows, K, x_stride, low_stride, y_stride;
};

#define W_ROW (CHUNK / 2 + 16)  // bytes: the eight rows that a warp reads at once lie in different banks
#define X_ROW (CHUNK * 2 + 32)
#define BLOCKS (CHUNK / 64)     // scales of a row in a chunk
#define STEPS (CHUNK / 16)      // instructions of a chunk, for each tile of rows
#define OUTPUTS (RING ? 16 : WARPS * 16)
#define W_STAGE (16 * W_ROW)    // bytes of one warp

__device__ __forceinline__ u32 shared_address(const void* p) {
    u32 a;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
    return a;
}
__device__ __forceinline__ void copy16(u32 to, const void* from, bool real) {  // zeros where there is nothing
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0));
}
__device__ __forceinline__ void copy4(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ float of_quad(float value, u32 lane) {  // lane's value, of these four threads
    float r;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1c1f, 0xffffffff;" : "=f"(r) : "f"(value), "r"(lane));
    return r;
}
__device__ __forceinline__ u32 pair(float first, float second) {
    u32 r;
#if F16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
#endif
    return r;
}
__device__ __forceinline__ float scaled(float level, float scale) {
    float w;
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(w) : "f"(level), "f"(scale));
    return w;
}
// Both levels of each byte of codes, 16 times over: a lane reads its own column, so that no two meet in a bank. Static,
// so that its address is a constant of the instruction.
__shared__ __align__(128) float2 lut[256 * 16];

__device__ __forceinline__ u32 weights(u32 at, float scale) {  // the two weights of a byte of codes; at: its bytes in lut
    const float2 level = *(const float2*)((const u8*)lut + at);
    return pair(scaled(level.x, scale), scaled(level.y, scale));
}
__device__ __forceinline__ void product(float* c, const u32* a, uint2 b) {
#if F16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
__device__ __forceinline__ float wide(u16 value) {
    float r;
#if F16
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(value));
#else
    r = __uint_as_float((u32)value << 16);
#endif
    return r;
}

// Operands of 16 columns: a thread has columns 4 t to 4 t + 3, as the instruction's 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
__device__ __forceinline__ void operands(u32* a, u32 column, const u8* w, int step, float s0, float s1) {
    const u32 v0 = *(const u16*)(w + step * 8), v1 = *(const u16*)(w + 8 * W_ROW + step * 8);
    a[0] = weights(((v0 << 7) & 0x7f80) | column, s0);
    a[1] = weights(((v1 << 7) & 0x7f80) | column, s1);
    a[2] = weights(((v0 >> 1) & 0x7f80) | column, s0);
    a[3] = weights(((v1 >> 1) & 0x7f80) | column, s1);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM) nf4_matmul(const __grid_constant__ Args args) {
    extern __shared__ __align__(128) u8 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int base = RING ? 0 : warp * 16;  // the warp's first output within the block

    int tile = blockIdx.x, which = 0;
    while (which + 1 < args.members) {
        const int tiles = (args.member[which].outputs + OUTPUTS - 1) / OUTPUTS;
        if (tile < tiles) break;
        tile -= tiles;
        ++which;
    }
#if OVERLAP
    asm volatile("griddepcontrol.launch_dependents;");  // who begins early waits, before all else, until this has ended
#endif
    const Member& own = args.member[which];
    const int K = args.K, chunks = K / CHUNK, blocks = K / 64, last = own.outputs - 1;
    const int first_row = blockIdx.y * (TILES * 8), first_output = tile * OUTPUTS;

    float* levels = (float*)shared;                       // 256
    u8* scales = shared + 1024;                           // [OUTPUTS, blocks]
    const int scale_row = blocks * (NESTED ? 1 : 4);      // bytes, a multiple of 4
    u8* stages = scales + OUTPUTS * scale_row;

    // Codes of one chunk for the 16 outputs of this warp, in 16-byte pieces.
    auto load_codes = [&](u32 to, int chunk) {
        const int line = lane / (CHUNK / 32), piece = lane % (CHUNK / 32);
#pragma unroll
        for (int i = 0; i < CHUNK / 64; ++i) {
            const int row = i * (1024 / CHUNK) + line, o = min(first_output + base + row, last);
            copy16(to + row * W_ROW + piece * 16, own.codes + (u64)o * (K / 2) + chunk * (CHUNK / 2) + piece * 16, true);
        }
    };
#if RING
    u8* const mine = stages + warp * STAGES * W_STAGE;
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
        if (warp + s * WARPS < chunks) load_codes(shared_address(mine + s * W_STAGE), warp + s * WARPS);
        asm volatile("cp.async.commit_group;");
    }
#else
    const int stage = WARPS * W_STAGE + TILES * 8 * X_ROW;
    auto load = [&](int chunk) {
        u8* at = stages + (chunk % STAGES) * stage;
        load_codes(shared_address(at + warp * W_STAGE), chunk);
        const u32 x = shared_address(at + WARPS * W_STAGE);
#pragma unroll
        for (int i = 0; i < TILES * CHUNK / (WARPS * 32); ++i) {
            const int piece = i * WARPS * 32 + threadIdx.x, row = piece / (CHUNK / 8), column = piece % (CHUNK / 8) * 8;
            const bool real = first_row + row < args.rows;
            copy16(x + row * X_ROW + column * 2,
                   args.x + (u64)(real ? first_row + row : 0) * args.x_stride + chunk * CHUNK + column, real);
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < chunks) load(s);
        asm volatile("cp.async.commit_group;");
    }
#endif
    // All scales of the block's outputs at once (a 32nd of its codes), and the table.
    for (int i = threadIdx.x; i < OUTPUTS * scale_row / 4; i += WARPS * 32) {
        const int row = i * 4 / scale_row, byte = i * 4 - row * scale_row, o = min(first_output + row, last);
        *(u32*)(scales + i * 4) = __ldg((const u32*)((const u8*)own.scales + (u64)o * scale_row + byte));
    }
    if (NESTED)
        for (int i = threadIdx.x; i < 256; i += WARPS * 32) levels[i] = __ldg(own.levels + i);
    for (int i = threadIdx.x; i < 256 * 8; i += WARPS * 32) {
        const float first = __ldg(args.nf4 + i / 128), second = __ldg(args.nf4 + i / 8 % 16);
        *(float4*)(lut + i * 2) = make_float4(first, second, first, second);
    }
    __syncthreads();

    u32 column = lane % 16 * 8;
    asm volatile("" : "+r"(column));  // kept as it is, so that mask and column are one instruction
    const int o0 = first_output + base + g;
    const float offset = NESTED ? __ldg(own.offset) : 0.0f;
    float c[TILES][4] = {};
#if RANK16
    // The adapter's operands are needed at the very end. B is read early, and so is low unless it is still being made.
    uint2 b_up[RANK16][2], b_low[RANK16][TILES];
    const bool adapted = own.b != 0 && (!RING || warp == (chunks - 1) % WARPS);
    auto read_low = [&]() {
#pragma unroll
        for (int r = 0; r < RANK16; ++r)
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const int row = first_row + n * 8 + g;
                b_low[r][n] = make_uint2(0, 0);
                if (r * 16 < own.rank && row < args.rows)
                    b_low[r][n] = __ldcg((const uint2*)(args.low + (u64)row * args.low_stride + own.at + r * 16 + t * 4));
            }
    };
    if (adapted) {
#pragma unroll
        for (int r = 0; r < RANK16; ++r) {
            const bool inside = r * 16 < own.rank;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                b_up[r][h] = make_uint2(0, 0);
                if (inside) b_up[r][h] = __ldg((const uint2*)(own.b + (u64)min(o0 + 8 * h, last) * own.rank + r * 16 + t * 4));
            }
        }
        if (!OVERLAP) read_low();
    }
#endif
    // Thread t of a quad makes the scales of block t of a chunk, for both of the quad's outputs.
    auto scale_of = [&](int chunk, int h) {
        const int row = base + g + 8 * h, block = chunk * BLOCKS + t % BLOCKS;
#if NESTED
        const u64 at = (u64)min(first_output + row, last) * blocks + block;
        return __fadd_rn(__fmul_rn(levels[scales[row * blocks + block]], __ldg(own.nested + (at >> 8))), offset);
#else
        return ((const float*)scales)[row * blocks + block];
#endif
    };

#if RING
    // A chunk's operands are made by one warp while others make theirs; only the products wait for their turn, with the
    // accumulator handed from warp to warp, so that its sum is in order.
    float4* const handed = (float4*)(stages + WARPS * STAGES * W_STAGE);  // [WARPS][TILES][32]
    const u16* x_rows[TILES];
    bool x_real[TILES];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        const int row = first_row + n * 8 + g;
        x_real[n] = row < args.rows;
        x_rows[n] = args.x + (u64)(x_real[n] ? row : 0) * args.x_stride + t * 4;
    }
    bool ends = false;
    int turn = 0;
    for (int chunk = warp; chunk < chunks; chunk += WARPS, ++turn) {
        uint2 x[STEPS][TILES];
#pragma unroll
        for (int j = 0; j < STEPS; ++j)
#pragma unroll
            for (int n = 0; n < TILES; ++n)
                x[j][n] = x_real[n] ? __ldg((const uint2*)(x_rows[n] + chunk * CHUNK + j * 16)) : make_uint2(0, 0);
        const float scale[2] = {scale_of(chunk, 0), scale_of(chunk, 1)};
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1));
        __syncwarp();
        const u8* w = mine + turn % STAGES * W_STAGE + g * W_ROW + t * 2;
        u32 a[STEPS][4];
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const float s0 = of_quad(scale[0], block), s1 = of_quad(scale[1], block);
#pragma unroll
            for (int q = 0; q < 4; ++q) operands(a[block * 4 + q], column, w, block * 4 + q, s0, s1);
        }
        __syncwarp();  // all have read the stage that is filled anew
        if (chunk + STAGES * WARPS < chunks) load_codes(shared_address(mine + turn % STAGES * W_STAGE), chunk + STAGES * WARPS);
        asm volatile("cp.async.commit_group;");
        if (chunk > 0) {
            asm volatile("bar.sync %0, 64;" ::"r"(1 + warp) : "memory");
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const float4 v = handed[(warp * TILES + n) * 32 + lane];
                c[n][0] = v.x, c[n][1] = v.y, c[n][2] = v.z, c[n][3] = v.w;
            }
        }
#pragma unroll
        for (int j = 0; j < STEPS; ++j)
#pragma unroll
            for (int n = 0; n < TILES; ++n) product(c[n], a[j], x[j][n]);
        if (chunk + 1 < chunks) {
            const int next = (warp + 1) % WARPS;
#pragma unroll
            for (int n = 0; n < TILES; ++n)
                handed[(next * TILES + n) * 32 + lane] = make_float4(c[n][0], c[n][1], c[n][2], c[n][3]);
            __threadfence_block();
            asm volatile("bar.arrive %0, 64;" ::"r"(1 + next) : "memory");
        } else {
            ends = true;
        }
    }
    if (!ends) return;
#else
    for (int chunk = 0; chunk < chunks; ++chunk) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        __syncthreads();
        if (chunk + STAGES - 1 < chunks) load(chunk + STAGES - 1);
        asm volatile("cp.async.commit_group;");
        const u8* at = stages + (chunk % STAGES) * stage;
        const u8* w = at + warp * W_STAGE + g * W_ROW + t * 2;
        const u8* x = at + WARPS * W_STAGE + g * X_ROW + t * 8;
        const float scale[2] = {scale_of(chunk, 0), scale_of(chunk, 1)};
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const float s0 = of_quad(scale[0], block), s1 = of_quad(scale[1], block);
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                u32 a[4];
                operands(a, column, w, block * 4 + q, s0, s1);
#pragma unroll
                for (int n = 0; n < TILES; ++n)
                    product(c[n], a, *(const uint2*)(x + n * 8 * X_ROW + (block * 4 + q) * 32));
            }
        }
    }
#endif

#if OVERLAP
    asm volatile("griddepcontrol.wait;" ::: "memory");  // until the kernel before has ended: it makes low
#endif
#if RANK16
    if (adapted) {
        if (OVERLAP) read_low();
#pragma unroll
        for (int r = 0; r < RANK16; ++r) {
            const u32 a[4] = {b_up[r][0].x, b_up[r][1].x, b_up[r][0].y, b_up[r][1].y};
#pragma unroll
            for (int n = 0; n < TILES; ++n) product(c[n], a, b_low[r][n]);
        }
    }
#endif
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int o = o0 + (i / 2) * 8, row = first_row + n * 8 + t * 2 + i % 2;
            if (o <= last && row < args.rows) {
                float y = c[n][i];
                if (own.bias) y = __fadd_rn(wide((u16)pair(y, 0.0f)), wide(own.bias[o]));  // as cuBLAS: two roundings
                args.y[(u64)row * args.y_stride + own.column + o] = (u16)pair(y, 0.0f);
            }
        }
}
