// What both kernels of a decode step's attention have in common, behind instructions.cu, with what is given to them.

struct Args {
    const u16 *q, *k_new, *v_new;
    const void *cos, *sin;              // [P, ROTARY], both halves equal
    u16 *k, *v;                         // [blocks, PAGE, K, E]
    const int *table, *lengths;         // [rows, N], [rows]
    u16* o;
    float *part, *stats;                // [rows, segments, K * HEADS, E]; the same, 2: peak and total
    int* arrived;                       // [rows, K]; 0, and 0 again at the end
    int q_stride, k_stride, v_stride, cos_stride, sin_stride, table_stride, o_stride;
    int N, P, K, segments, rows;
    float scale;                        // times log2(e)
};

#define ROW (E * 2 + 16)                // bytes: eight rows' 16 bytes lie in different banks
#define PIECES (E / 8)                  // of 16 bytes
#define HALF (ROTARY / 2)
#define TILES (SEGMENT / TILE)
#define NONE __int_as_float(0xff800000)  // -inf

__device__ __forceinline__ float angle(const void* table, u64 at) {
    return ANGLES == 4 ? ((const float*)table)[at] : wide(((const u16*)table)[at]);
}
__device__ __forceinline__ u16 narrowed(float value) { return (u16)pair(value, 0.0f); }
__device__ __forceinline__ float finite(float peak) { return peak == NONE ? 0.0f : peak; }

// The next segment into those before it.
__device__ __forceinline__ void weights(float& peak, float next, float& before, float& after) {
    const float higher = larger(peak, next), base = finite(higher);
    before = power_of_2(__fadd_rn(peak, -base)), after = power_of_2(__fadd_rn(next, -base));
    peak = higher;
}
__device__ __forceinline__ float merged(float sum, float before, float next, float after) {
    return __fadd_rn(__fmul_rn(sum, before), __fmul_rn(next, after));
}
__device__ __forceinline__ u16 finished(float sum, float total) { return narrowed(__fdiv_rn(sum, total == 0.0f ? 1.0f : total)); }
// Element i of a row's HEADS queries of a kv head, of ``used`` segments, from the first; four are on their way at once.
__device__ __forceinline__ u16 merged_parts(const Args& args, u64 row_parts, int used, int i) {
    float peak = NONE, total = 0.0f, sum = 0.0f;
    for (int group = 0; group < used; group += 4) {
        float peaks[4], totals[4], sums[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u64 row = row_parts + (u64)(group + j) * (args.K * HEADS) + i / E;
            const bool there = group + j < used;
            peaks[j] = there ? seen_by_all(args.stats + row * 2) : NONE;
            totals[j] = there ? seen_by_all(args.stats + row * 2 + 1) : 0.0f;
            sums[j] = there ? seen_by_all(args.part + row * E + i % E) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float before, after;
            weights(peak, peaks[j], before, after);
            total = merged(total, before, totals[j], after);
            sum = merged(sum, before, sums[j], after);
        }
    }
    return finished(sum, total);
}
