// A decode step's attention for few rows: rotation, the write of the new token, attention, merging. What it computes and
// in which order: step_attention.py. Compiled at run time behind instructions.cu and step_attention_parts.cu, with these
// given:
//   E       elements of a head, a multiple of 16, 128 at most     HEADS   query heads of a kv head, 8 at most
//   ROTARY  elements of a head that are rotated                   PAGE    tokens of a block of the cache
//   ANGLES  bytes of an angle: 2 (as all else) or 4 (float)       F16     float16 in place of bfloat16
//   SEGMENT, TILE                                                 CHAIN   begins while the kernel before runs; 2:
//           lets the next do so at once
//
// A block has one kv head's keys of one segment of one row, all of them in shared memory: what there is to do is little,
// and what counts is that no step waits for memory. Keys and values of earlier tokens are on their way before the kernel
// that makes the new one has ended. Scores of all tiles are taken at once, then all maxima, then all exponentials; only
// what is summed goes from tile to tile, as the order of the sum says. Keys are the rows of the instruction's left
// operand and queries the columns of the right one, of which there are 8: no bit depends on which is which.

#define WARPS 8
#define THREADS (WARPS * 32)
#define P_ROW (SEGMENT * 2 + 16)
#define PAIRS ((HEADS + 1) * HALF)      // to rotate: queries, then the key
#define ROUNDS ((PAIRS + THREADS - 1) / THREADS)
#define COPIES (SEGMENT * PIECES / THREADS)  // of 16 bytes, of keys and of values, by a thread
#define KEYS (SEGMENT / WARPS)          // that a warp scores

// Where in shared memory: keys, values, queries, probabilities, maxima of warps, cos and sin, who comes last.
#define V_AT (SEGMENT * ROW)
#define Q_AT (2 * SEGMENT * ROW)
#define P_AT (Q_AT + 8 * ROW)
#define MAX_AT (P_AT + 8 * P_ROW)
#define ANGLES_AT (MAX_AT + WARPS * 8 * 4)
#define LAST_AT (ANGLES_AT + ROTARY * 4)
#define SHARED_BYTES (LAST_AT + 16)

extern "C" __global__ void __launch_bounds__(THREADS, 1) step_attention(const __grid_constant__ Args args) {
#if CHAIN == 2
    NEXT_MAY_BEGIN;
#endif
    const int head = blockIdx.x, segment = blockIdx.y, b = blockIdx.z, thread = threadIdx.x;
    const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    // Blocks of tokens do not depend on how many there are: both are asked for at once.
    const int asked = read_early(args.lengths + b), begin = segment * SEGMENT;
    const int* const table = args.table + (u64)b * args.table_stride;
    int pages[COPIES];
#pragma unroll
    for (int n = 0; n < COPIES; ++n) {
        const int at = (begin + (n * THREADS + thread) / PIECES) / PAGE;
        pages[n] = read_early(table + min(at, args.N - 1));
    }
    const int length = min(max(asked, 0), args.N * PAGE);
    if (begin >= length && segment > 0) return;
    const int count = min(length - begin, SEGMENT), tiles = (count + TILE - 1) / TILE, position = length - 1;
    // The new token's place in this segment; -1 where it is in another, or has no slot or angle.
    const bool known = length > 0 && asked == length && position < args.P;
    const int fresh = known && position < begin + SEGMENT ? position - begin : -1;
    const u64 token = (u64)args.K * E;
    const u32 here = shared_address(shared);

#pragma unroll
    for (int n = 0; n < COPIES; ++n) {
        const int key = (n * THREADS + thread) / PIECES, piece = (n * THREADS + thread) % PIECES;
        const u32 to = key * ROW + piece * 16;
        if (key >= tiles * TILE) break;
        if (key >= count) {  // hidden, but multiplied by 0: numbers
            *(float4*)(shared + to) = make_float4(0, 0, 0, 0);
            *(float4*)(shared + V_AT + to) = make_float4(0, 0, 0, 0);
        } else if (key != fresh) {
            const u64 at = ((u64)pages[n] * PAGE + (begin + key) % PAGE) * token + head * E + piece * 8;
            copy16(here + to, args.k + at);
            copy16(here + V_AT + to, args.v + at);
        }
    }
    COPIES_END;
    float* const angles = (float*)(shared + ANGLES_AT);
    if (thread < HALF) {
        const int at = min(max(position, 0), args.P - 1);
        angles[thread] = angle(args.cos, (u64)at * args.cos_stride + thread);
        angles[HALF + thread] = angle(args.sin, (u64)at * args.sin_stride + thread);
    }
    for (int i = thread; i < (8 - HEADS) * PIECES; i += THREADS)
        *(float4*)(shared + Q_AT + (HEADS + i / PIECES) * ROW + i % PIECES * 16) = make_float4(0, 0, 0, 0);
    u64 slot = 0;
    if (fresh >= 0) slot = ((u64)__ldg(table + position / PAGE) * PAGE + position % PAGE) * token + head * E;
    __syncthreads();
#if CHAIN  // what was read up to here is older than the chain
    BEFORE_HAS_ENDED;
#endif
#if CHAIN == 1
    NEXT_MAY_BEGIN;
#endif
    const u16* const q = args.q + (u64)b * args.q_stride + head * (HEADS * E);
    const u16* const k_new = args.k_new + (u64)b * args.k_stride + head * E;
    const u16* const v_new = args.v_new + (u64)b * args.v_stride + head * E;
    const bool has_v = fresh >= 0 && thread >= THREADS - PIECES;  // threads with the fewest pairs
    float4 v_piece;
    if (has_v) v_piece = *(const float4*)(v_new + (thread - (THREADS - PIECES)) * 8);
    u16 lefts[ROUNDS], rights[ROUNDS];
#pragma unroll
    for (int n = 0; n < ROUNDS; ++n) {
        const int i = n * THREADS + thread, row = i / HALF, at = i % HALF;
        if (row > HEADS || (row == HEADS && fresh < 0)) continue;
        const u16* const x = row == HEADS ? k_new : q + row * E;
        lefts[n] = x[at], rights[n] = x[at + HALF];
    }
#pragma unroll
    for (int n = 0; n < ROUNDS; ++n) {
        const int i = n * THREADS + thread, row = i / HALF, at = i % HALF;
        if (row > HEADS || (row == HEADS && fresh < 0)) continue;
        const float left = wide(lefts[n]), right = wide(rights[n]), c = angles[at], s = angles[HALF + at];
        const u16 new_left = narrowed(__fadd_rn(__fmul_rn(left, c), -__fmul_rn(right, s)));
        const u16 new_right = narrowed(__fadd_rn(__fmul_rn(right, c), __fmul_rn(left, s)));
        u16* const to = (u16*)(shared + (row == HEADS ? fresh * ROW : Q_AT + row * ROW));
        to[at] = new_left, to[at + HALF] = new_right;
        if (row == HEADS) args.k[slot + at] = new_left, args.k[slot + at + HALF] = new_right;
    }
#if E > ROTARY
    for (int i = thread; i < (HEADS + 1) * (E - ROTARY); i += THREADS) {
        const int row = i / (E - ROTARY), at = ROTARY + i % (E - ROTARY);
        if (row == HEADS && fresh < 0) break;
        const u16 x = row == HEADS ? k_new[at] : q[row * E + at];
        ((u16*)(shared + (row == HEADS ? fresh * ROW : Q_AT + row * ROW)))[at] = x;
        if (row == HEADS) args.k[slot + at] = x;
    }
#endif
    if (has_v) {
        const int piece = thread - (THREADS - PIECES);
        *(float4*)(shared + V_AT + fresh * ROW + piece * 16) = v_piece;
        *(float4*)(args.v + slot + piece * 8) = v_piece;
    }
    COPIES_WAIT(0);
    __syncthreads();

    // Scores of a warp's keys: c[i] has keys 16 i + g and + 8 of queries 2 t and 2 t + 1.
    float c[KEYS / 16][4] = {};
    float* const most = (float*)(shared + MAX_AT);  // [WARPS][8]
    const int first = warp * KEYS;
    if (first < tiles * TILE) {
#pragma unroll
        for (int step = 0; step < E / 16; step += 2) {
            u32 of_q[4];
            read_pieces(of_q, here + Q_AT + lane % 8 * ROW + min(step * 2 + lane / 8, PIECES - 1) * 16);
#pragma unroll
            for (int j = 0; j < 2 && step + j < E / 16; ++j)
#pragma unroll
                for (int i = 0; i < KEYS / 16; ++i) {
                    u32 key[4];
                    read_pieces(key, here + (first + i * 16 + lane % 16) * ROW + (step + j) * 32 + lane / 16 * 16);
                    multiply(c[i], key[0], key[1], key[2], key[3], of_q[2 * j], of_q[2 * j + 1]);
                }
        }
        float high[2] = {NONE, NONE};
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (first + i * 16 + j / 2 * 8 + g >= count) c[i][j] = NONE;
                high[j % 2] = larger(high[j % 2], c[i][j]);
            }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            for (int lanes = 4; lanes < 32; lanes *= 2) high[j] = larger(high[j], of_other(high[j], lanes));
            if (g == 0) most[warp * 8 + t * 2 + j] = high[j];
        }
    }
    __syncthreads();

    // From tile to tile: the peak so far, and what is lost of what was summed under the one before.
    float peak[2] = {NONE, NONE}, own[2] = {0, 0}, decay[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        if (tile >= tiles) break;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float high = NONE;
#pragma unroll
            for (int w = tile * (TILE / KEYS); w < (tile + 1) * (TILE / KEYS); ++w) high = larger(high, most[w * 8 + t * 2 + j]);
            const float higher = larger(peak[j], __fmul_rn(high, args.scale)), base = finite(higher);
            decay[tile][j] = power_of_2(__fadd_rn(peak[j], -base));
            peak[j] = higher;
            if (tile == first / TILE) own[j] = base;
        }
    }
    if (first < tiles * TILE)
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u16* const row = (u16*)(shared + P_AT + (t * 2 + j % 2) * P_ROW);
                row[first + i * 16 + j / 2 * 8 + g] = narrowed(power_of_2(__fmaf_rn(c[i][j], args.scale, -own[j % 2])));
            }
    __syncthreads();

    const bool alone = length <= SEGMENT;
    const u64 part_row = ((u64)b * args.segments + segment) * (args.K * HEADS) + head * HEADS;
    const u32 one = pair(1.0f, 1.0f);
#pragma unroll 1
    for (int block = warp; block < E / 16; block += WARPS) {  // 16 elements of o: rows, and queries columns
        float sum[4] = {}, total[4] = {};
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            if (tile >= tiles) break;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sum[j] = __fmul_rn(sum[j], decay[tile][j % 2]);
                total[j] = __fmul_rn(total[j], decay[tile][j % 2]);
            }
#pragma unroll
            for (int step = 0; step < TILE / 16; step += 2) {
                const int key = tile * TILE + step * 16;
                u32 p[4], value[2][4];
                read_pieces(p, here + P_AT + lane % 8 * P_ROW + key * 2 + lane / 8 * 16);
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    read_pieces_turned(value[j], here + V_AT + (key + j * 16 + lane / 16 * 8 + lane % 8) * ROW + block * 32 + lane / 8 % 2 * 16);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    multiply(total, one, one, one, one, p[2 * j], p[2 * j + 1]);
                    multiply(sum, value[j][0], value[j][1], value[j][2], value[j][3], p[2 * j], p[2 * j + 1]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int query = t * 2 + j % 2, element = block * 16 + j / 2 * 8 + g;
            if (query >= HEADS) continue;
            if (alone)
                args.o[(u64)b * args.o_stride + (head * HEADS + query) * E + element] =
                    narrowed(__fdiv_rn(sum[j], total[j] == 0.0f ? 1.0f : total[j]));
            else
                args.part[(part_row + query) * E + element] = sum[j];
        }
        if (!alone && block == 0 && g == 0)
#pragma unroll
            for (int j = 0; j < 2; ++j)
                if (t * 2 + j < HEADS) {
                    args.stats[(part_row + t * 2 + j) * 2] = peak[j];
                    args.stats[(part_row + t * 2 + j) * 2 + 1] = total[j];
                }
    }
    if (alone) return;

    // The last of a row's segments to come here merges all of them, from the first.
    int* const last = (int*)(shared + LAST_AT);
    __syncthreads();  // all of this block's part, before its arrival is seen
    const int used = (length + SEGMENT - 1) / SEGMENT;
    int* const arrived = args.arrived + b * args.K + head;
    if (thread == 0) *last = count_arrivals(arrived, 1) == used - 1;
    __syncthreads();
    if (!*last) return;
    const u64 row_parts = (u64)b * args.segments * (args.K * HEADS) + head * HEADS;
#pragma unroll
    for (int n = 0; n < (HEADS * E + THREADS - 1) / THREADS; ++n) {
        const int i = n * THREADS + thread;
        if (i >= HEADS * E) break;
        args.o[(u64)b * args.o_stride + head * (HEADS * E) + i] = merged_parts(args, row_parts, used, i);
    }
    if (thread == 0) *arrived = 0;
}
