// y = x [W_1; W_2; W_3]^T + low (s B)^T + bias for a handful of rows, weights read as NF4 codes, once.
// What the kernel is and why it is so: nf4_matmul.py. Compiled at run time, with these given:
//   WARPS   warps of a block, each with 16 outputs of its own      TILES  tiles of 8 rows of x
//   CHUNK   columns of one stage (128 or 256)                      STAGES stages on their way or in use
//   NESTED  scales are 8-bit codes (else float32)                  RANK16 16-column pieces of an adapter
//   F16     float16 in place of bfloat16

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
#define OUTPUTS (WARPS * 16)
#define STAGE (OUTPUTS * W_ROW + TILES * 8 * X_ROW)

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
__device__ __forceinline__ u32 from_lane16(u32 value, u32 lane) {  // of this half of the warp; only 4 bits are looked at
    u32 r;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x101f, 0xffffffff;" : "=r"(r) : "r"(value), "r"(lane));
    return r;
}
__device__ __forceinline__ float from_lane4(float value, u32 lane) {  // of this quad
    float r;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1c1f, 0xffffffff;" : "=f"(r) : "f"(value), "r"(lane));
    return r;
}
__device__ __forceinline__ float weight(u32 lut, u32 code, float scale) {
    float w;
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(w) : "f"(__uint_as_float(from_lane16(lut, code))), "f"(scale));
    return w;
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

extern "C" __global__ void __launch_bounds__(WARPS * 32) nf4_matmul(const __grid_constant__ Args args) {
    extern __shared__ __align__(16) u8 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    int tile = blockIdx.x, which = 0;
    while (which + 1 < args.members) {
        const int tiles = (args.member[which].outputs + OUTPUTS - 1) / OUTPUTS;
        if (tile < tiles) break;
        tile -= tiles;
        ++which;
    }
    const Member& own = args.member[which];
    const int K = args.K, chunks = K / CHUNK, blocks = K / 64, last = own.outputs - 1;
    const int first_row = blockIdx.y * (TILES * 8);

    float* levels = (float*)shared;                       // 256
    u8* scales = shared + 1024;                           // [OUTPUTS, blocks]
    u8* stages = scales + OUTPUTS * blocks * (NESTED ? 1 : 4);
    const int scale_row = blocks * (NESTED ? 1 : 4);      // bytes, a multiple of 4

    // All of a block's scales at once: 1/32 of its codes.
    for (int i = threadIdx.x; i < OUTPUTS * scale_row / 4; i += WARPS * 32) {
        const int row = i * 4 / scale_row, byte = i * 4 - row * scale_row;
        const int o = min(tile * OUTPUTS + row, last);
        copy4(shared_address(scales + i * 4), (const u8*)own.scales + (u64)o * scale_row + byte);
    }
    if (NESTED)
        for (int i = threadIdx.x; i < 256; i += WARPS * 32) levels[i] = __ldg(own.levels + i);

    const int w_line = lane / (CHUNK / 32), w_piece = lane % (CHUNK / 32);  // 16-byte pieces of a row
    auto load = [&](int chunk) {
        const u32 base = shared_address(stages + (chunk % STAGES) * STAGE);
#pragma unroll
        for (int i = 0; i < CHUNK / 64; ++i) {
            const int row = warp * 16 + i * (1024 / CHUNK) + w_line;
            const int o = min(tile * OUTPUTS + row, last);
            copy16(base + row * W_ROW + w_piece * 16, own.codes + (u64)o * (K / 2) + chunk * (CHUNK / 2) + w_piece * 16, true);
        }
#pragma unroll
        for (int i = 0; i < TILES * CHUNK / (WARPS * 32); ++i) {
            const int piece = i * WARPS * 32 + threadIdx.x, row = piece / (CHUNK / 8), at = piece % (CHUNK / 8);
            const bool real = first_row + row < args.rows;
            copy16(base + OUTPUTS * W_ROW + row * X_ROW + at * 16,
                   args.x + (u64)(real ? first_row + row : 0) * args.x_stride + chunk * CHUNK + at * 8, real);
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < chunks) load(s);
        asm volatile("cp.async.commit_group;");
    }

    const int o0 = tile * OUTPUTS + warp * 16 + g;
    const u32 lut = __float_as_uint(__ldg(args.nf4 + (lane & 15)));
    const float offset = NESTED ? __ldg(own.offset) : 0.0f;
    float c[TILES][4] = {};
#if RANK16
    // The adapter's operands, read early: they are needed at the very end.
    uint2 b_up[RANK16][2], b_low[RANK16][TILES];
    const bool adapted = own.b != 0;
    if (adapted) {
#pragma unroll
        for (int r = 0; r < RANK16; ++r) {
#pragma unroll
            for (int h = 0; h < 2; ++h)
                b_up[r][h] = r * 16 >= own.rank ? make_uint2(0, 0) : __ldg((const uint2*)(own.b + (u64)min(o0 + 8 * h, last) * own.rank + r * 16 + t * 4));
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const int row = first_row + n * 8 + g;
                b_low[r][n] = make_uint2(0, 0);
                if (row < args.rows && r * 16 < own.rank)
                    b_low[r][n] = *(const uint2*)(args.low + (u64)row * args.low_stride + own.at + r * 16 + t * 4);
            }
        }
    }
#endif

    for (int chunk = 0; chunk < chunks; ++chunk) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        __syncthreads();
        if (chunk + STAGES - 1 < chunks) load(chunk + STAGES - 1);
        asm volatile("cp.async.commit_group;");

        const u8* w = stages + (chunk % STAGES) * STAGE + (warp * 16 + g) * W_ROW + t * 2;
        const u8* x = stages + (chunk % STAGES) * STAGE + OUTPUTS * W_ROW + g * X_ROW + t * 8;
        // Thread t of a quad makes the scales of block t of the chunk, for both of the quad's rows.
        float scale[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = warp * 16 + g + 8 * h, block = chunk * BLOCKS + t % BLOCKS;
#if NESTED
            const u64 at = (u64)min(tile * OUTPUTS + row, last) * blocks + block;
            const float level = levels[scales[row * blocks + block]];
            scale[h] = __fadd_rn(__fmul_rn(level, __ldg(own.nested + (at >> 8))), offset);
#else
            scale[h] = ((const float*)scales)[row * blocks + block];
#endif
        }
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const float s0 = from_lane4(scale[0], block), s1 = from_lane4(scale[1], block);
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const int j = block * 4 + q;  // 16 columns, of which a thread has 4 t to 4 t + 3 as the instruction's 2 t, 2 t + 1, 2 t + 8, 2 t + 9
                const u32 v0 = *(const u16*)(w + j * 8), v1 = *(const u16*)(w + 8 * W_ROW + j * 8);
                u32 a[4];
                a[0] = pair(weight(lut, v0 >> 4, s0), weight(lut, v0, s0));
                a[1] = pair(weight(lut, v1 >> 4, s1), weight(lut, v1, s1));
                a[2] = pair(weight(lut, v0 >> 12, s0), weight(lut, v0 >> 8, s0));
                a[3] = pair(weight(lut, v1 >> 12, s1), weight(lut, v1 >> 8, s1));
#pragma unroll
                for (int n = 0; n < TILES; ++n) product(c[n], a, *(const uint2*)(x + n * 8 * X_ROW + j * 32));
            }
        }
    }

#if RANK16
    if (adapted) {
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
                if (own.bias) y = __fadd_rn(y, wide(own.bias[o]));
                args.y[(u64)row * args.y_stride + own.column + o] = (u16)pair(y, 0.0f);
            }
        }
}
