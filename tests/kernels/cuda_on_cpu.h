// What a kernel's source needs to run on a CPU: a thread of the system for each of CUDA's, a block after another. Included
// before it, behind its macros and KERNEL, its name. Instructions do what their manual says, sums in double.
#define INSTRUCTIONS_GIVEN
#ifndef LOW
#define LOW 0
#endif
#include "standard.h"

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(n)
#define __launch_bounds__(...)
#define __maxnreg__(...)
using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim { int x, y, z; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

thread_local dim threadIdx, blockIdx;
dim gridDim;
alignas(128) extern unsigned char shared[];
alignas(128) unsigned char shared[232448];

struct Warp {
    std::barrier<> together{32};
    unsigned u[32][8];
    float f[32];
};
std::atomic<long> moves;  // of all threads together: who waits while nobody moves waits in vain
struct Named {  // bar.sync and bar.arrive
    std::mutex mutex;
    std::condition_variable changed;
    int come = 0, round = 0;
    void arrive(bool wait, int all = 64) {
        ++moves;
        std::unique_lock lock(mutex);
        const int mine = round;
        if (++come == all) {
            come = 0, ++round;
            changed.notify_all();
        } else if (wait) {
            changed.wait(lock, [&] { return round != mine; });
        }
    }
};
std::vector<std::unique_ptr<Warp>> warps;
std::unique_ptr<std::barrier<>> block;
Named named[16];
inline Warp& own_warp() { return *warps[threadIdx.x / 32]; }
inline int own_lane() { return threadIdx.x % 32; }

inline void __syncthreads() { block->arrive_and_wait(); }
inline void __syncwarp() {
    ++moves;
    own_warp().together.arrive_and_wait();
}
inline float shuffle(float value, int from) {
    Warp& w = own_warp();
    w.f[own_lane()] = value;
    __syncwarp();
    const float r = w.f[from];
    __syncwarp();
    return r;
}
inline float __shfl_sync(unsigned, float value, int from) { return shuffle(value, from); }
inline int __shfl_sync(unsigned, unsigned value, int from) { return (int)shuffle((float)value, from); }
inline int __shfl_sync(unsigned, int value, int from) { return (int)shuffle((float)value, from); }
inline float of_other(float value, unsigned lanes) { return shuffle(value, own_lane() ^ lanes); }
inline float of_quad(float value, unsigned lane) { return shuffle(value, own_lane() / 4 * 4 + lane); }
template <class T> T __ldg(const T* p) { return *p; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __int_as_float(unsigned value) {
    float r;
    std::memcpy(&r, &value, 4);
    return r;
}
inline float power_of_2(float x) { return std::exp2(x); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline int read_early(const int* from) { return *from; }
inline float seen_by_all(const float* from) { return *from; }
inline void four_seen_by_all(float* to, const float4* from) { std::memcpy(to, from, 16); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned picks) {
    const uint64_t both = (uint64_t)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) r |= (unsigned)(both >> (picks >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}

inline unsigned permute(unsigned a, unsigned b, unsigned picks) {
    unsigned r = __byte_perm(a, b, picks);
    for (int i = 0; i < 4; ++i)
        if (picks >> (4 * i + 3) & 1) r = r & ~(255u << 8 * i) | (r >> (8 * i + 7) & 1) * 255u << 8 * i;
    return r;
}

inline uint16_t narrow(float v) {
#if F16
    _Float16 h = (_Float16)v;
    uint16_t r;
    std::memcpy(&r, &h, 2);
    return r;
#else
    uint32_t r;
    std::memcpy(&r, &v, 4);
    return (uint16_t)((r + 0x7fff + (r >> 16 & 1)) >> 16);
#endif
}
inline float wide(uint16_t v) {
#if F16
    _Float16 h;
    std::memcpy(&h, &v, 2);
    return (float)h;
#else
    const uint32_t r = (uint32_t)v << 16;
    float f;
    std::memcpy(&f, &r, 4);
    return f;
#endif
}
inline unsigned pair(float first, float second) { return narrow(first) | (unsigned)narrow(second) << 16; }
inline float scaled(float level, float scale) { return level * scale; }

inline unsigned shared_address(const void* p) { return (unsigned)((const unsigned char*)p - shared); }
// Copies happen as late as they may: those of a thread when it waits for them, or when it says that they have come.
struct Copy { unsigned to; const void* from; unsigned bytes; };
thread_local std::vector<std::vector<Copy>> copies(1);  // the last group is open
void too_early_to_read(const void* from, bool itself = false);
inline void copy(unsigned to, const void* from, unsigned bytes) {
    too_early_to_read(from);
    copies.back().push_back({to, from, bytes});
}
inline void copy16(unsigned to, const void* from) { copy(to, from, 16); }
inline void copy4(unsigned to, const void* from) { copy(to, from, 4); }
inline void copies_end() { copies.emplace_back(); }
inline void copies_wait(size_t newest, bool open) {  // all groups but the newest ones, the open one not counted
    while (copies.size() > newest + 1 || (open && !copies.front().empty())) {
        for (const Copy& c : copies.front()) std::memcpy(shared + c.to, c.from, c.bytes);
        if (copies.size() > 1) copies.erase(copies.begin()); else copies.front().clear();
    }
}
inline uint2 codes8(const unsigned char* from) {
    uint2 r;
    std::memcpy(&r, from, 8);
    return r;
}
inline void read_pieces(unsigned* x, unsigned from) {
    Warp& w = own_warp();
    const int lane = own_lane();
    w.u[lane][0] = from;
    __syncwarp();
    for (int i = 0; i < 4; ++i) std::memcpy(x + i, shared + w.u[8 * i + lane / 4][0] + lane % 4 * 4, 4);
    __syncwarp();
}
inline void read_pieces_turned(unsigned* x, unsigned from) {
    Warp& w = own_warp();
    const int lane = own_lane();
    w.u[lane][0] = from;
    __syncwarp();
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j)
            std::memcpy((char*)(x + i) + 2 * j, shared + w.u[8 * i + lane % 4 * 2 + j][0] + lane / 4 * 2, 2);
    __syncwarp();
}
inline void multiply(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    Warp& w = own_warp();
    const int lane = own_lane(), g = lane / 4, t = lane % 4;
    const unsigned given[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(w.u[lane], given, sizeof given);
    __syncwarp();
    auto half = [](unsigned word, int i) { return (double)wide((uint16_t)(word >> 16 * i)); };
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = t * 2 + i % 2;
        double sum = 0;
        for (int k = 0; k < 16; ++k) {
            const int of = k % 8 / 2;  // the thread of a quad that has columns k
            sum += half(w.u[row % 8 * 4 + of][row / 8 + k / 8 * 2], k % 2) * half(w.u[column * 4 + of][4 + k / 8], k % 2);
        }
        c[i] = (float)(c[i] + sum);
    }
    __syncwarp();
}
inline unsigned described(unsigned at) { return at / 16; }
#ifdef MULTIPLIES_WIDE
inline double at(unsigned from, int row, int column) {  // of what the engine brought
    const unsigned place = from + row * 128 + column * 2;
    uint16_t r;
    std::memcpy(&r, shared + (place ^ (place >> 7 & 7) << 4), 2);
    return wide(r);
}
#ifdef ROWS
// What is read here may not be written before the thread waits again, which nothing here looks at.
inline void multiply_wide(float (*c)[4], unsigned k0, unsigned k1, unsigned k2, unsigned k3, unsigned x) {
    Warp& w = own_warp();
    const int lane = own_lane(), g = lane / 4, t = lane % 4;
    const unsigned given[4] = {k0, k1, k2, k3};
    std::memcpy(w.u[lane], given, sizeof given);
    __syncwarp();
    auto half = [](unsigned word, int i) { return (double)wide((uint16_t)(word >> 16 * i)); };
    for (int j = 0; j < ROWS / 8; ++j)
        for (int i = 0; i < 4; ++i) {
            const int row = g + i / 2 * 8, column = t * 2 + i % 2;
            double sum = 0;
            for (int k = 0; k < 16; ++k)
                sum += half(w.u[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) * at(x * 16, j * 8 + column, k);
            c[j][i] = (float)(c[j][i] + sum);
        }
    __syncwarp();
}
#endif
typedef unsigned long long u64;
inline u64 described_both(unsigned at) { return described(at); }
template <int N> void multiply_wide_both(float* c, u64 x, u64 w) {  // 64 rows of x, N of w, 16 columns
    const int lane = own_lane(), g = lane / 4, t = lane % 4, rows = threadIdx.x / 32 % 4 * 16;
    for (int j = 0; j < N / 8; ++j)
        for (int i = 0; i < 4; ++i) {
            double sum = 0;
            for (int k = 0; k < 16; ++k) sum += at(x * 16, rows + g + i / 2 * 8, k) * at(w * 16, j * 8 + t * 2 + i % 2, k);
            c[j * 4 + i] = (float)(c[j * 4 + i] + sum);
        }
    __syncwarp();
}
inline void write_pieces_turned(unsigned to, unsigned a, unsigned b, unsigned c, unsigned d) {
    Warp& w = own_warp();
    const int lane = own_lane();
    const unsigned given[4] = {a, b, c, d};
    w.u[lane][0] = to;
    __syncwarp();
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j)
            std::memcpy(shared + w.u[8 * i + lane % 4 * 2 + j][0] + lane / 4 * 2, (const char*)(given + i) + 2 * j, 2);
    __syncwarp();
}
#endif
#define MULTIPLIES_BEGIN
#define MULTIPLIES_END
#define MULTIPLIES_WAIT(n)
#ifndef FILLED_BY
#define FILLED_BY 1  // arrivals at a stage's counter
#endif
std::atomic<bool> asked;  // for what one thread tells its block
std::atomic<bool> stuck;  // a wait that did not end: no other waits then
struct Counter {  // mbarrier
    std::mutex mutex;
    std::condition_variable changed;
    int all = 0, missing = 0, bytes = 0;  // arrivals, and bytes to come
    unsigned phase = 0;
    void count(int arrivals, int more) {
        ++moves;
        std::unique_lock lock(mutex);
        missing -= arrivals, bytes += more;
        if (missing || bytes) return;
        missing = all, ++phase;
        changed.notify_all();
    }
};
Counter counters[sizeof shared / 8];
inline void counter_begin(unsigned at, int arrivals) {
    Counter& c = counters[at / 8];
    std::unique_lock lock(c.mutex);
    c.all = c.missing = arrivals, c.bytes = 0, c.phase = 0;
}
inline void counter_arrive(unsigned at) { counters[at / 8].count(1, 0); }
inline void counter_arrive_with_copies(unsigned at) {
    copies_wait(0, true);
    counter_arrive(at);
}
struct Map { uint64_t from, stride, rows, columns, box_rows, words, groups, unused[9]; };  // as a test fills it; words: if
unsigned row_bytes(const Map& map) { return map.words ? map.words * 4 : 128; }               // not 0, of 32 bits
inline void counter_arrive_expecting(unsigned at, int bytes) { counters[at / 8].count(1, bytes); }
// Nothing is left of what lay there, and the block comes when someone waits for it.
struct Brought { unsigned to; Map map; int column, row; unsigned counter; };
std::vector<Brought> brought;
std::mutex engine;
inline const char* place_of(const Map& map, unsigned column, unsigned row) {
    const unsigned size = map.words ? 4 : 2;
    return row < map.rows && column < map.columns ? (const char*)map.from + (row * map.stride + column) * size : nullptr;
}
inline void bring(unsigned to, const Map& map, int column, int row, unsigned counter) {
    if (const void* const from = place_of(map, column, row)) too_early_to_read(from, true);
    std::memset(shared + to, 0xff, map.box_rows * row_bytes(map));
    std::unique_lock lock(engine);
    brought.push_back({to, map, column, row, counter});
}
inline void bring_bytes(unsigned to, const void* from, int bytes, unsigned counter) {
    const uint64_t words = bytes / 4;
    if (to % 16 || bytes % 16) stuck = true;
    bring(to, Map{(uint64_t)from, words, 1, words, 1, words}, 0, 0, counter);
}
inline void bring_groups(unsigned to, const Map& map, int group, int row, unsigned counter) {
    for (int i = 0; i < map.groups; ++i) bring(to + i * map.box_rows * 128, map, (group + i) * 64, row, counter);
}
inline void come(unsigned counter) {
    std::unique_lock lock(engine);
    for (const Brought& b : brought) {
        if (b.counter != counter) continue;
        const unsigned size = b.map.words ? 4 : 2, bytes = row_bytes(b.map);
        for (unsigned r = 0; r < b.map.box_rows; ++r)
            for (unsigned i = 0; i < bytes / size; ++i) {
                const char* const from = place_of(b.map, b.column + i, b.row + r);
                const unsigned place = b.to + r * bytes + i * size;
                unsigned char* const at = shared + (b.map.words ? place : place ^ (place >> 7 & 7) << 4);
                if (from) std::memcpy(at, from, size); else std::memset(at, 0, size);
            }
        counters[counter / 8].count(0, -(int)(b.map.box_rows * bytes));
    }
    std::erase_if(brought, [=](const Brought& b) { return b.counter == counter; });
}
#define FETCH_MAP(map)
#define SHOW_COUNTERS
#define SHOW_WRITES
inline unsigned counter_ended(unsigned at, unsigned parity) {  // copies come to who waits, so it rarely has
    Counter& c = counters[at / 8];
    std::unique_lock lock(c.mutex);
    return (c.phase & 1) != parity;
}
inline void counter_wait(unsigned at, unsigned parity) {  // until the phase of this parity has ended
    Counter& c = counters[at / 8];
    if (c.all == FILLED_BY) asked = true;
    long before = moves;
    for (int still = 0; still < 500; ++still) {  // five seconds
        if (moves != before) before = moves, still = 0;
        come(at);
        std::unique_lock lock(c.mutex);
        if (c.changed.wait_for(lock, std::chrono::milliseconds(10), [&] { return (c.phase & 1) != parity || stuck; })) return;
    }
    stuck = true;
}
#define COPIES_END copies_end()
#define COPIES_WAIT(n) copies_wait(n, false)
#define ALL_COPIES_WAIT copies_wait(0, true)
#define MEET named[1].arrive(true, 128)
#define TURN_WAIT(id) named[id].arrive(true)
#define TURN_GIVE(id) named[id].arrive(false)
// What the kernel before makes comes when a thread waits for its end. What is done too early is counted.
struct Before {
    void* late;                           // where what it makes is read
    const void* whole;                    // what that will be
    const void* low;                      // what is made of it here, to be read by a block that has heard that it is there
    const unsigned short* y;
    long long late_bytes, low_bytes, y_elements;
    int early;                            // of these read, of y written, the next begun: before they may
};
Before* before;
std::atomic<bool> there, ended, heard;  // what is late, at all; for this block; and low
thread_local bool waited;
inline void too_early(bool so) {
    if (so && before) std::atomic_ref(before->early)++;
}
inline int count_arrivals(int* counter, int n) {
    too_early(!waited);
    return std::atomic_ref(*counter).fetch_add(n);
}
inline bool within(const void* at, const void* from, long long bytes) {
    return before && from && at >= from && at < (const char*)from + bytes;
}
inline void too_early_to_read(const void* from, bool itself) {  // itself: whoever asks the engine has waited, not another
    too_early(before && within(from, before->late, before->late_bytes) && !(itself ? waited : ended.load()));
    if (!within(from, before ? before->low : nullptr, before ? before->low_bytes : 0)) return;
    asked = true;
    too_early(!heard);
}
inline unsigned flag_read(const unsigned* flag) {
    thread_local int looks = 0;
    for (int i = 0; !looks && !asked && i < 20000; ++i)  // late: not before someone of the block waits for it, or does not
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    const unsigned r = std::atomic_ref(*const_cast<unsigned*>(flag)).load();
    if (r) heard = true;
    else std::this_thread::sleep_for(std::chrono::microseconds(100));
    if (++looks > 1000) return too_early(true), 1;  // never set: a tenth of a second
    return r;
}
inline void flag_set(unsigned* flag) {
    too_early(blockIdx.x < LOW - 1);  // others of these blocks have still to run
    std::atomic_ref(*flag).store(1);
}
inline unsigned flag_count(unsigned* flag, unsigned last) {
    std::atomic_ref value(*flag);
    unsigned was = value.load();
    while (!value.compare_exchange_weak(was, was >= last ? 0 : was + 1)) {}
    return was;
}
inline void next_may_begin() { too_early(LOW && !waited); }
inline void before_has_ended() {
    static std::mutex mutex;
    std::unique_lock lock(mutex);
    if (before && !there.exchange(true)) {
        too_early(std::any_of(before->y, before->y + before->y_elements, [](unsigned short v) { return v != 0xffff; }));
        std::memcpy(before->late, before->whole, before->late_bytes);
    }
    ended = waited = true;
}
inline unsigned low_pair(const unsigned short* from) {
    too_early_to_read(from);
    unsigned r;
    std::memcpy(&r, from, 4);
    return r;
}
#define NEXT_MAY_BEGIN next_may_begin()
#define BEFORE_HAS_ENDED before_has_ended()
#define PAUSE
#define SHOW_FAR_WRITES
#define FETCH_TO_L2(p) (void)(p)
#define KEEP(value)
#define KEEP_FLOAT(value)
