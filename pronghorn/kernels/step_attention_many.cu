// A decode step's attention for many rows: rotation, the write of the new token, attention, merging. What it computes and
// in which order: step_attention.py. Compiled at run time behind instructions.cu and step_attention_parts.cu, with these
// given:
//   E       elements of a head, 64 or 128                         HEADS   query heads of a kv head, 8 at most
//   ROTARY  elements of a head that are rotated                   PAGE    tokens of a block of the cache: 8 or more,
//   ANGLES  bytes of an angle: 2 (as all else) or 4 (float)               that divide a tile or are several
//   SEGMENT, TILE, STAGES                                         F16     float16 in place of bfloat16
//   MOST    rows at most                                          SHARE   blocks that share a multiprocessor
//   COPY_ENGINE
//   CHAIN   begins while the kernel before runs; 2: lets the next do so at once
//
// All there is to do are tiles of keys, of one row after another. As many blocks as there are kv heads have the same tiles,
// each those of its head, so that what lies side by side in memory is read at the same time; groups of blocks have as many
// tiles as each other, whole segments. A block asks for the next ones while it computes one, whichever row's they are:
// memory is never idle between rows. Blocks of the cache come by the copy engine, asked for by a warp that does nothing
// else: with 16 bytes a request, two thirds of all instructions would be addresses. A row whose segments are all of one
// group is merged in registers; of others, a group's first and last, the block that ends last merges all. Keys are the
// rows of the instruction's left operand and queries the columns of the right one, of which there are 8: no bit depends on
// which is which.

struct ManyArgs {
    Map of_k, of_v;  // [blocks PAGE, K E], in boxes of BOX rows and E columns, 64 together
    Args args;
};

#define WARPS 5
#define COMPUTING 4                     // of the warps; the last one asks for tiles
#define THREADS (COMPUTING * 32)
#define P_ROW (TILE * 2 + 16)
#define SCORERS (TILE / 16)             // warps that score 16 keys each
#define BOX (PAGE < TILE ? PAGE : TILE)  // tokens that one request brings
#define BOXES (TILE / BOX)
#define BLOCKS (E / 16 / COMPUTING)     // of 16 elements of o, by a warp

// Where in shared memory. A stage: a tile's keys and its values, box after box; of a box 64 elements of all tokens and then
// the other 64, as the engine brings them. Inputs of a row's kv head, and of the next: queries, the new key and value, cos
// and sin.
#define V_AT (TILE * E * 2)
#define STAGE (2 * V_AT)
#define INPUTS_AT (STAGES * STAGE)
#define NEXT_INPUTS_AT (INPUTS_AT + INPUTS)
#define K_NEW_AT (HEADS * ROW)
#define V_NEW_AT (K_NEW_AT + E * 2)
#define COS_AT (V_NEW_AT + E * 2)
#define SIN_AT (COS_AT + HALF * ANGLES)
#define INPUTS (SIN_AT + HALF * ANGLES)
#define P_AT (INPUTS_AT + 2 * INPUTS)
#define MAX_AT (P_AT + 8 * P_ROW)
#define LENGTHS_AT (MAX_AT + SCORERS * 8 * 4)
#define WORDS_AT (LENGTHS_AT + MOST * 4)  // sums of warps; where to begin; who comes last
#define FILLED_AT (WORDS_AT + 64)         // counters of stages: who waits for a tile, who for its last reader
#define EMPTIED_AT (FILLED_AT + STAGES * 8)
#define SHARED_BYTES (EMPTIED_AT + STAGES * 8)

// Where of a tile's keys, or values, one begins, and its bytes from ``byte`` on, 16 of which lie together.
#define ROW_PLACE(key) ((key) / BOX * (BOX * E * 2) + (key) % BOX * 128)
__device__ __forceinline__ u32 place(int key, int byte) {
    return ROW_PLACE(key) + byte / 128 * (BOX * 128) + (byte % 128 ^ key % 8 * 16);
}

// A tile among all: its number, its row, its number among that row's, how many these are. A row without a token has one.
struct Tile {
    int x, row, tile, tiles, asked, length;
};
__device__ __forceinline__ void in_row(const Args& args, Tile& at) {
    if (at.row >= args.rows) return;
    at.asked = ((const int*)(shared + LENGTHS_AT))[at.row];
    at.length = min(max(at.asked, 0), args.N * PAGE);
    at.tiles = max((at.length + TILE - 1) / TILE, 1);
}
__device__ __forceinline__ void advance(const Args& args, Tile& at) {
    ++at.x;
    if (++at.tile < at.tiles) return;
    at.tile = 0, ++at.row;
    in_row(args, at);
}
__device__ __forceinline__ bool behind(const Tile& at, int end) { return at.tile % TILES == 0 && at.x >= end; }
// The new token's place in this tile; -1 where it is in another, or has no slot or angle.
__device__ __forceinline__ int fresh_of(const Args& args, const Tile& at) {
    const int position = at.length - 1;
    const bool known = at.length > 0 && at.asked == at.length && position < args.P;
    return known && position / TILE == at.tile ? position % TILE : -1;
}
// By one warp: a request a lane, of keys or values, one of the tile's boxes. A page is asked for before it is needed.
__device__ __forceinline__ int ask_page(const Args& args, const Tile& at) {
    const int token = at.tile * TILE + (int)threadIdx.x % 32 % BOXES * BOX;
    return read_early(args.table + (u64)at.row * args.table_stride + min(token / PAGE, args.N - 1));
}
__device__ __forceinline__ void ask_tile(const ManyArgs& given, const Tile& at, int head, int page, int stage) {
    const int lane = threadIdx.x % 32, box = lane % BOXES, values = lane / BOXES;
    const int boxes = min(max((at.length - at.tile * TILE + BOX - 1) / BOX, 0), BOXES);  // with a token
    const u32 here = shared_address(shared), filled = here + FILLED_AT + stage * 8;
    __syncwarp();  // all have seen that the stage is free: of a tile without a token the next phase ends at once
    if (lane == 0) counter_arrive_expecting(filled, boxes * (BOX * E * 4));
    __syncwarp();
    if (box < boxes && values < 2)
        bring_groups(here + stage * STAGE + values * V_AT + box * (BOX * E * 2), values ? given.of_v : given.of_k,
                     head * (E / 64), page * PAGE + (at.tile * TILE + box * BOX) % PAGE, filled);
}
__device__ __forceinline__ void ask_inputs(const Args& args, const Tile& at, int head, u32 inputs) {
    const u32 here = shared_address(shared) + inputs;
    const u16* const q = args.q + (u64)at.row * args.q_stride + head * (HEADS * E);
    const u16* const k = args.k_new + (u64)at.row * args.k_stride + head * E;
    const u16* const v = args.v_new + (u64)at.row * args.v_stride + head * E;
    const int position = min(max(at.length - 1, 0), args.P - 1), angles = HALF * ANGLES / 16;
    for (int i = threadIdx.x; i < (HEADS + 2) * PIECES + 2 * angles; i += THREADS) {
        const int j = i - HEADS * PIECES, a = j - 2 * PIECES;
        if (j < 0) copy16(here + i / PIECES * ROW + i % PIECES * 16, q + i * 8);
        else if (j < PIECES) copy16(here + K_NEW_AT + j * 16, k + j * 8);
        else if (a < 0) copy16(here + V_NEW_AT + (j - PIECES) * 16, v + (j - PIECES) * 8);
        else if (a < angles) copy16(here + COS_AT + a * 16, (const u8*)args.cos + (u64)position * args.cos_stride * ANGLES + a * 16);
        else copy16(here + SIN_AT + (a - angles) * 16, (const u8*)args.sin + (u64)position * args.sin_stride * ANGLES + (a - angles) * 16);
    }
}
// Queries where they are; the new key to its place among its tile's, the new value, too. Values behind the last token are
// hidden, but multiplied by 0: numbers.
__device__ __forceinline__ void complete(u8* inputs, u8* stage, bool queries, int fresh, int count) {
    for (int i = (queries ? 0 : HEADS * HALF) + threadIdx.x; i < (HEADS + (fresh >= 0)) * HALF; i += THREADS) {
        const int row = i / HALF, at = i % HALF;
        const u16* const from = (const u16*)(inputs + (row == HEADS ? K_NEW_AT : row * ROW));
        const float left = wide(from[at]), right = wide(from[at + HALF]);
        const float c = angle(inputs + COS_AT, at), s = angle(inputs + SIN_AT, at);
        u8* const to_left = row == HEADS ? stage + place(fresh, at * 2) : inputs + row * ROW + at * 2;
        u8* const to_right = row == HEADS ? stage + place(fresh, (at + HALF) * 2) : inputs + row * ROW + (at + HALF) * 2;
        *(u16*)to_left = narrowed(__fadd_rn(__fmul_rn(left, c), -__fmul_rn(right, s)));
        *(u16*)to_right = narrowed(__fadd_rn(__fmul_rn(right, c), __fmul_rn(left, s)));
    }
    for (int i = max(count, 0) * PIECES + threadIdx.x; i < TILE * PIECES; i += THREADS)
        *(float4*)(stage + V_AT + place(i / PIECES, i % PIECES * 16)) = make_float4(0, 0, 0, 0);
    if (fresh < 0) return;
    for (int i = ROTARY + threadIdx.x; i < E; i += THREADS)
        *(u16*)(stage + place(fresh, i * 2)) = ((const u16*)(inputs + K_NEW_AT))[i];
    for (int i = THREADS - 1 - threadIdx.x; i < PIECES; i += THREADS)  // threads with nothing to rotate, if there are any
        *(float4*)(stage + V_AT + place(fresh, i * 16)) = *(const float4*)(inputs + V_NEW_AT + i * 16);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, SHARE) step_attention(const __grid_constant__ ManyArgs given) {
    const Args& args = given.args;
#if CHAIN == 2
    NEXT_MAY_BEGIN;
#endif
    const int thread = threadIdx.x, warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = thread % 32, g = lane / 4, t = lane % 4;
    const u32 base_of_shared = shared_address(shared);
    int* const lengths = (int*)(shared + LENGTHS_AT);
    int* const words = (int*)(shared + WORDS_AT);
    const int head = blockIdx.x % args.K, group = blockIdx.x / args.K, groups = gridDim.x / args.K;
    if (thread == 0) {
        FETCH_MAP(given.of_k);
        FETCH_MAP(given.of_v);
        for (int i = 0; i < STAGES; ++i) {
            counter_begin(base_of_shared + FILLED_AT + i * 8, 1);
            counter_begin(base_of_shared + EMPTIED_AT + i * 8, COMPUTING);
        }
        SHOW_COUNTERS;
    }

    // Which tiles are this block's: all of them, counted, in as many parts as there are groups.
    const int own_rows = (args.rows + WARPS * 32 - 1) / (WARPS * 32);
    int own = 0;
    for (int n = 0; n < own_rows; ++n) {
        const int row = thread * own_rows + n;
        if (row >= args.rows) break;
        const int asked = read_early(args.lengths + row), length = min(max(asked, 0), args.N * PAGE);
        lengths[row] = asked;
        own += max((length + TILE - 1) / TILE, 1);
    }
    int sum_of_warp = own;
    for (int n = 1; n < 32; n *= 2) {
        const int left = __shfl_sync(0xffffffffu, sum_of_warp, (lane - n) & 31);
        if (lane >= n) sum_of_warp += left;
    }
    if (lane == 31) words[warp] = sum_of_warp;
    __syncthreads();
    int all = 0, before = sum_of_warp - own;
    for (int n = 0; n < WARPS; ++n) {
        if (n < warp) before += words[n];
        all += words[n];
    }
    const int first = (int)((u64)all * group / groups), end = (int)((u64)all * (group + 1) / groups);
    int begin = before;
    for (int n = 0; n < own_rows; ++n) {
        Tile at;
        at.row = thread * own_rows + n;
        if (at.row >= args.rows) break;
        in_row(args, at);
        if (first >= begin && first < begin + at.tiles) {  // one thread's: the next whole segment from there on
            at.tile = (first - begin + TILES - 1) / TILES * TILES;
            const bool in_next = at.tile >= at.tiles;
            words[8] = begin + (in_next ? at.tiles : at.tile);
            words[9] = at.row + in_next;
            words[10] = in_next ? 0 : at.tile;
        }
        begin += at.tiles;
    }
    __syncthreads();
    Tile here = {words[8], words[9], words[10], 1, 0, 0};
    in_row(args, here);
    const u32 filled = base_of_shared + FILLED_AT, emptied = base_of_shared + EMPTIED_AT;
    int stage = 0, phase = 0;
    if (warp == COMPUTING) {
        int page = 0;  // of this lane's box of the next tile
        if (!behind(here, end)) page = ask_page(args, here);
        for (int n = 0; !behind(here, end); ++n) {
            if (n >= STAGES) counter_wait(emptied + stage * 8, phase ^ 1);
            ask_tile(given, here, head, page, stage);
            advance(args, here);
            if (!behind(here, end)) page = ask_page(args, here);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
        return;
    }
#if CHAIN  // what was read up to here is older than the chain
    BEFORE_HAS_ENDED;
#endif
#if CHAIN == 1
    NEXT_MAY_BEGIN;
#endif
    if (!behind(here, end)) ask_inputs(args, here, head, INPUTS_AT);
    COPIES_END;

    float peak[2], total[4], sum[BLOCKS][4], all_peak[2], all_total[2], all_sum[BLOCKS][4];
    auto begin_segment = [&]() {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            peak[j % 2] = NONE, total[j] = 0;
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n) sum[n][j] = 0;
        }
    };
    auto begin_row = [&]() {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            all_peak[j % 2] = NONE, all_total[j % 2] = 0;
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n) all_sum[n][j] = 0;
        }
        return here.tile == 0 && here.x + (here.tiles - 1) / TILES * TILES < end;  // whether all of it is this block's
    };
    begin_segment();
    bool whole = begin_row(), starts = true;
    int parts[2] = {}, part_of[2] = {};  // of two rows, the first and the last: how many who ends last merges; which rows
    u32 of_head = INPUTS_AT;
    const int swizzle = lane % 8 * 16;
    const u32 value_at = ROW_PLACE(lane / 16 * 8 + lane % 8) + (warp * 32 + lane / 8 % 2 * 16 ^ swizzle);
    float* const most = (float*)(shared + MAX_AT);  // [SCORERS][8]
    const u32 one = pair(1.0f, 1.0f);
#pragma unroll 1
    while (!behind(here, end)) {
        const u32 of_tile = stage * STAGE;
        const int count = here.length - here.tile * TILE;
        int fresh = -1, page = 0;
        counter_wait(filled + stage * 8, phase);
        if (starts || here.tile == here.tiles - 1) {
            fresh = fresh_of(args, here);
            if (starts) {
                COPIES_WAIT(0);
                MEET;  // inputs are there, those of all threads
            }
            complete(shared + of_head, shared + of_tile, starts, fresh, count);
            if (here.tile == here.tiles - 1) SHOW_WRITES;  // it waits for what this thread reads, too: ahead of other reads
            MEET;
            if (fresh >= 0) page = read_early(args.table + (u64)here.row * args.table_stride + (here.length - 1) / PAGE);
        }
        Tile next = here;
        advance(args, next);
        if (next.tile == 0 && !behind(next, end)) {
            ask_inputs(args, next, head, of_head ^ INPUTS_AT ^ NEXT_INPUTS_AT);
            COPIES_END;
        }

        // Scores of a warp's 16 keys: c has keys g and g + 8 of queries 2 t and 2 t + 1.
        float c[4] = {};
        if (SCORERS == COMPUTING || warp < SCORERS) {
            const u32 q_at = base_of_shared + of_head + min(lane % 8, HEADS - 1) * ROW;
            const u32 key_at = base_of_shared + of_tile + ROW_PLACE(warp * 16 + lane % 16);
#pragma unroll
            for (int step = 0; step < E / 16; step += 2) {
                u32 of_q[4];
                read_pieces(of_q, q_at + min(step * 2 + lane / 8, PIECES - 1) * 16);
#pragma unroll
                for (int j = 0; j < 2 && step + j < E / 16; ++j) {
                    u32 key[4];
                    read_pieces(key, key_at + (step + j) / 4 * (BOX * 128) + ((step + j) % 4 * 32 + lane / 16 * 16 ^ swizzle));
                    multiply(c, key[0], key[1], key[2], key[3], of_q[2 * j], of_q[2 * j + 1]);
                }
            }
            float high[2] = {NONE, NONE};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (warp * 16 + j / 2 * 8 + g >= count) c[j] = NONE;
                high[j % 2] = larger(high[j % 2], c[j]);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                for (int lanes = 4; lanes < 32; lanes *= 2) high[j] = larger(high[j], of_other(high[j], lanes));
                if (g == 0) most[warp * 8 + t * 2 + j] = high[j];
            }
        }
        MEET;

        // The peak so far, and what is lost of what was summed under the one before.
        float own_base[2], decay[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float high = NONE;
#pragma unroll
            for (int w = 0; w < SCORERS; ++w) high = larger(high, most[w * 8 + t * 2 + j]);
            const float higher = larger(peak[j], __fmul_rn(high, args.scale));
            own_base[j] = finite(higher);
            decay[j] = power_of_2(__fadd_rn(peak[j], -own_base[j]));
            peak[j] = higher;
        }
        if (SCORERS == COMPUTING || warp < SCORERS)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u16* const row = (u16*)(shared + P_AT + (t * 2 + j % 2) * P_ROW);
                row[warp * 16 + j / 2 * 8 + g] = narrowed(power_of_2(__fmaf_rn(c[j], args.scale, -own_base[j % 2])));
            }
        MEET;

        // 16 elements of o are rows of a product, and queries its columns; the sum of probabilities, one with ones.
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            total[j] = __fmul_rn(total[j], decay[j % 2]);
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n) sum[n][j] = __fmul_rn(sum[n][j], decay[j % 2]);
        }
#pragma unroll
        for (int step = 0; step < TILE / 16; step += 2) {
            u32 p[4];
            read_pieces(p, base_of_shared + P_AT + lane % 8 * P_ROW + step * 32 + lane / 8 * 16);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const u32 key_at = base_of_shared + of_tile + V_AT + ROW_PLACE((step + j) * 16) + value_at;
                multiply(total, one, one, one, one, p[2 * j], p[2 * j + 1]);
#pragma unroll
                for (int n = 0; n < BLOCKS; ++n) {
                    u32 value[4];
                    read_pieces_turned(value, key_at + n * (BOX * 128));
                    multiply(sum[n], value[0], value[1], value[2], value[3], p[2 * j], p[2 * j + 1]);
                }
            }
        }

        if (fresh >= 0 && thread < 2 * PIECES) {
            const int piece = thread % PIECES, position = here.length - 1;
            const u64 to = (((u64)page * PAGE + position % PAGE) * args.K + head) * E + piece * 8;
            const u8* const from = shared + of_tile + place(fresh, piece * 16);
            if (thread < PIECES) *(float4*)(args.k + to) = *(const float4*)from;
            else *(float4*)(args.v + to) = *(const float4*)(from + V_AT);
        }
        __syncwarp();
        if (lane == 0) counter_arrive(emptied + stage * 8);
        const bool last_tile = here.tile == here.tiles - 1;
        if (last_tile || here.tile % TILES == TILES - 1) {
            u16* const o = args.o + (u64)here.row * args.o_stride + head * (HEADS * E);
            const u64 head_part = (u64)here.row * args.segments * (args.K * HEADS) + head * HEADS;
            if (whole) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float of_before, of_this;
                    weights(all_peak[j], peak[j], of_before, of_this);
                    all_total[j] = merged(all_total[j], of_before, total[j], of_this);
#pragma unroll
                    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                        for (int i = j; i < 4; i += 2) all_sum[n][i] = merged(all_sum[n][i], of_before, sum[n][i], of_this);
                }
                if (last_tile)
#pragma unroll
                    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            const int query = t * 2 + j % 2, element = (warp + n * COMPUTING) * 16 + j / 2 * 8 + g;
                            if (query < HEADS) o[query * E + element] = finished(all_sum[n][j], all_total[j % 2]);
                        }
            } else {
                const u64 part_row = head_part + (u64)(here.tile / TILES) * (args.K * HEADS);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int query = t * 2 + j % 2;
                    if (query >= HEADS) continue;
#pragma unroll
                    for (int n = 0; n < BLOCKS; ++n) {
                        const int element = (warp + n * COMPUTING) * 16 + j / 2 * 8 + g;
                        args.part[(part_row + query) * E + element] = sum[n][j];
                    }
                    if (warp == 0 && g == 0 && j < 2) {
                        args.stats[(part_row + query) * 2] = peak[j];
                        args.stats[(part_row + query) * 2 + 1] = total[j];
                    }
                }
                if (here.row == words[9]) ++parts[0], part_of[0] = here.row;
                else ++parts[1], part_of[1] = here.row;
            }
            begin_segment();
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
        starts = next.tile == 0;
        here = next;
        if (starts) of_head ^= INPUTS_AT ^ NEXT_INPUTS_AT, whole = begin_row();
    }
    if (parts[0] + parts[1] == 0) return;

    // The last of a row's segments to come here: all of them are merged, from the first.
    MEET;  // all of this block's parts, before their arrival is seen
    if (thread < 2) {
        const int n = thread == 0 ? parts[0] : parts[1], row = thread == 0 ? part_of[0] : part_of[1];
        const int length = min(max(lengths[row], 0), args.N * PAGE), used = max((length + SEGMENT - 1) / SEGMENT, 1);
        words[12 + thread] = n > 0 && count_arrivals(args.arrived + row * args.K + head, n) == used - n ? used : 0;
    }
    MEET;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const int used = words[12 + which], row = part_of[which];
        if (used == 0) continue;
        const u64 row_parts = (u64)row * args.segments * (args.K * HEADS) + head * HEADS;
        for (int i = thread; i < HEADS * E; i += THREADS)
            args.o[(u64)row * args.o_stride + head * (HEADS * E) + i] = merged_parts(args, row_parts, used, i);
        if (thread == 0) args.arrived[row * args.K + head] = 0;
    }
}
