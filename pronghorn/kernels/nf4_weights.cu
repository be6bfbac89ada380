// What a product with NF4 weights is given, and how a code becomes a weight; nf4_matmul.cu says what the macros are.

struct Member {
    const u8* codes;        // [outputs / 8][K / 64][8][4][2][4]: tiles, see nf4_layout.py
    const void* scales;     // a scale for each 64 weights of a row: u8 codes if NESTED, else float
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
    u16* low;
    u16* y;
    float nf4[16];          // the levels of a weight code
    int members, rows, K, x_stride, low_stride, y_stride;
    const u16* a;           // if LOW: A of all adapters, [ranks, K]
    int ranks;
    int* counts;            // if LOW: 0 between launches: blocks that have made their part of low; see LOW_FLAG
    float* parts;           // if LOW: [8, ranks in whole 16, 8]
    int joined;             // a block may have outputs of several members (each group of warps of one): levels are the same
};

#define WARPS (GROUPS * RING)  // of a block
#define TABLE 65536            // bytes of shared memory, from its start: both levels of each byte of codes
#define LEVELS 1024            // behind it: those of the scales' codes

// The table holds both levels of each byte of codes, 16 times over, so that the lanes of half a warp never meet in a
// bank, and 256 bytes apart, so that one permutation makes the address of code and column.
__device__ __forceinline__ u32 weights(u32 word, int byte, u32 column, float scale) {
    const float2 level = *(const float2*)(shared + __byte_perm(word, column, 0x5504 | byte << 4));
    return pair(scaled(level.x, scale), scaled(level.y, scale));
}
// Both by all threads of a block. level: of the code lane % 16.
__device__ __forceinline__ void copy_levels(const Member& own) {
    float* const levels = (float*)(shared + TABLE);
    if (NESTED)
        for (int i = threadIdx.x; i < 256; i += WARPS * 32) levels[i] = __ldg(own.levels + i);
}
__device__ __forceinline__ void make_table(float level) {
    for (int i = threadIdx.x; i < 256 * 8; i += WARPS * 32) {  // whole warps, each with one first level
        const float first = __shfl_sync(0xffffffffu, level, i / 128), second = __shfl_sync(0xffffffffu, level, i / 8 % 16);
        *(float4*)(shared + i / 8 * 256 + i % 8 * 16) = make_float4(first, second, first, second);
    }
}
// The same without memory, for some of the weights, as the unit that looks levels up is what the sums wait for. A thread's
// 16 weights of a block have one scale: their 16 possible values, rounded, by bytes, low[i] of four values and high[i],
// are looked up by permutations.
#if PERMUTED
struct Values {
    u32 low[4], high[4];
};
__device__ __forceinline__ Values values_of(const Args& args, float scale) {
    Values v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float* const level = args.nf4 + i * 4;
        const u32 first = pair(scaled(level[0], scale), scaled(level[1], scale));
        const u32 second = pair(scaled(level[2], scale), scaled(level[3], scale));
        v.low[i] = __byte_perm(first, second, 0x6420), v.high[i] = __byte_perm(first, second, 0x7531);
    }
    return v;
}
// Four codes, in the low half of `codes` without their highest bits, where `upper` says which of them had that: a byte
// of each value.
__device__ __forceinline__ u32 bytes_of(const u32* table, u32 codes, u32 upper) {
    return __byte_perm(table[0], table[1], codes) & ~upper | __byte_perm(table[2], table[3], codes) & upper;
}
// k[q]: both weights of byte q of a word.
__device__ __forceinline__ void permuted(u32 (*k)[2], int half, const Values& v, u32 word) {
    const u32 codes = word & 0x77777777, even = word << 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 four = codes >> i * 16, upper = permute(even, word, i ? 0xfbea : 0xd9c8);  // signs
        const u32 low = bytes_of(v.low, four, upper), high = bytes_of(v.high, four, upper);
        k[i * 2 * PAIR][half] = __byte_perm(low, high, 0x4051), k[(i * 2 + 1) * PAIR][half] = __byte_perm(low, high, 0x6273);
    }
}
#endif
