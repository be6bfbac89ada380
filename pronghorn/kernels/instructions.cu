// Instructions that CUDA C++ has no words for, or other ones, ahead of each kernel's source. Given: F16 (float16 in place
// of bfloat16).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

extern __shared__ __align__(1024) u8 shared[];

#ifndef INSTRUCTIONS_GIVEN  // by a test, in C++, which runs a kernel on a CPU
__device__ __forceinline__ u32 shared_address(const void* p) {
    u32 a;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
    return a;
}
__device__ __forceinline__ void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void copy4(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ uint2 codes8(const u8* from) {  // read once: not to push x out of the cache
    uint2 r;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(from));
    return r;
}
__device__ __forceinline__ u32 low_pair(const u16* from) {  // through L1: the warps of a block read the same at once
    u32 r;
    asm volatile("ld.global.ca.u32 %0, [%1];" : "=r"(r) : "l"(from) : "memory");
    return r;
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
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 picks) {  // with 8 in a pick, the sign of that byte in all bits
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(picks));
    return r;
}
__device__ __forceinline__ float scaled(float level, float scale) {
    float w;
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(w) : "f"(level), "f"(scale));
    return w;
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

__device__ __forceinline__ void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if F16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Four 8 x 8 pieces of rows, 16 bytes each; every lane gives the address of one.
__device__ __forceinline__ void read_pieces(u32* x, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
// The same pieces with rows and columns exchanged.
__device__ __forceinline__ void read_pieces_turned(u32* x, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ float power_of_2(float x) {  // as Triton's exp2
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float larger(float a, float b) {  // the number, where one is none
    float r;
    asm("max.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
__device__ __forceinline__ float of_other(float value, u32 lanes) {  // of the lane whose number differs by these bits
    return __shfl_xor_sync(0xffffffffu, value, lanes);
}
__device__ __forceinline__ int read_early(const int* from) {  // what this kernel does not write, here and not later
    int r;
    asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(r) : "l"(from));
    return r;
}
__device__ __forceinline__ float seen_by_all(const float* from) {  // past L1, which knows its own writes alone
    float r;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(r) : "l"(from) : "memory");
    return r;
}
__device__ __forceinline__ void four_seen_by_all(float* to, const float4* from) {
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "l"(from) : "memory");
}
__device__ __forceinline__ int count_arrivals(int* counter, int n) {  // of all threads that met at a barrier; what it was
    int r;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(r) : "l"(counter), "r"(n) : "memory");
    return r;
}
// Counters of arrivals in shared memory. Each time that all have come a phase ends, whose parity one can wait for.
__device__ __forceinline__ void counter_begin(u32 counter, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(counter), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void counter_arrive(u32 counter) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(counter) : "memory");
}
__device__ __forceinline__ void counter_arrive_with_copies(u32 counter) {  // when this thread's copies are there
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(counter) : "memory");
}
__device__ __forceinline__ void counter_wait(u32 counter, u32 parity) {
    u32 ended;
    do
#if __CUDA_ARCH__ >= 900  // sleeps a while
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#else
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#endif
                     : "=r"(ended) : "r"(counter), "r"(parity) : "memory");
    while (!ended);
}
__device__ __forceinline__ u32 counter_ended(u32 counter, u32 parity) {  // whether that phase has
    u32 ended;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(ended) : "r"(counter), "r"(parity) : "memory");
    return ended;
}
// Hopper's own: the engine that copies blocks of a tensor by its map, and products of four warps at once (wgmma).
#if defined(COPY_ENGINE) || defined(MULTIPLIES_WIDE)
struct alignas(64) Map {
    u64 opaque[16];
};
// A block of a tensor to shared memory. Its bytes count for the counter, whose phase ends with the last that is expected.
__device__ __forceinline__ void bring(u32 to, const Map& map, int column, int row, u32 counter) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(counter) : "memory");
}
// Bytes as they lie; both places and their number are multiples of 16.
__device__ __forceinline__ void bring_bytes(u32 to, const void* from, int bytes, u32 counter) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(counter) : "memory");
}
#define FETCH_MAP(map) asm volatile("prefetch.tensormap [%0];" ::"l"(&(map)) : "memory")
// A block of a tensor whose columns are groups of 64: from a group and a row on, as many of both as the map says.
__device__ __forceinline__ void bring_groups(u32 to, const Map& map, int group, int row, u32 counter) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                 ::"r"(to), "l"(&map), "r"(0), "r"(row), "r"(group), "r"(counter) : "memory");
}
__device__ __forceinline__ void counter_arrive_expecting(u32 counter, int bytes) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
                 ::"r"(counter), "r"(bytes) : "memory");
}
// To the engine, counters that this thread has begun. It waits for all that the thread reads, too: ahead of other reads.
#define SHOW_COUNTERS asm volatile("fence.proxy.async.shared::cta;" ::: "memory")
#define SHOW_WRITES SHOW_COUNTERS  // of this thread, in shared memory that the engine will write
#endif
#ifdef MULTIPLIES_WIDE
// Where x is, as the instruction reads it, in units of 16 bytes. As the engine brings it, eight rows of 128 bytes are 1024
// bytes, aligned to as many; 16 bytes of a row lie where their number, exclusive or the row's, says (PTX, wgmma, "128-byte
// swizzle").
__device__ __forceinline__ u32 described(u32 at) { return at >> 4 | 1 << 16; }
#define FOUR(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#if F16
#define WIDE_TYPES ".f32.f16.f16 "
#else
#define WIDE_TYPES ".f32.bf16.bf16 "
#endif
#ifdef ROWS
// c += k x^T for a warp's 16 outputs, which a thread has as `multiply` has its left operand, and ROWS rows of x in shared
// memory, 16 columns of them. Begun, not done: until MULTIPLIES_WAIT neither k nor c may be touched, nor x written.
__device__ __forceinline__ void multiply_wide(float (*c)[4], u32 k0, u32 k1, u32 k2, u32 k3, u32 described_x) {
    const u64 x = (u64)(1024 >> 4 | 1 << 30) << 32 | described_x;
#if ROWS == 32
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16" WIDE_TYPES
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, 1, 1, 1, 0;"
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3) : "r"(k0), "r"(k1), "r"(k2), "r"(k3), "l"(x));
#elif ROWS == 64
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16" WIDE_TYPES
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"
                 "%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7)
                 : "r"(k0), "r"(k1), "r"(k2), "r"(k3), "l"(x));
#else
#error ROWS is 32 or 64
#endif
}
#endif
// c += x W^T for 64 rows of x, 16 a warp, and N of W, 16 columns, both in shared memory. A thread has four of each eight
// sums as `multiply` has them; begun, as above.
__device__ __forceinline__ u64 described_both(u32 at) { return (u64)(1024 >> 4 | 1 << 30) << 32 | described(at); }
#define EIGHT(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
template <int N> __device__ void multiply_wide_both(float* c, u64 x, u64 w);
template <> __device__ __forceinline__ void multiply_wide_both<16>(float* c, u64 x, u64 w) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16" WIDE_TYPES
                 "{%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1, 1, 1, 0, 0;"
                 : EIGHT(0) : "l"(x), "l"(w));
}
template <> __device__ __forceinline__ void multiply_wide_both<32>(float* c, u64 x, u64 w) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16" WIDE_TYPES
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, 1, 1, 1, 0, 0;"
                 : EIGHT(0), EIGHT(8) : "l"(x), "l"(w));
}
template <> __device__ __forceinline__ void multiply_wide_both<48>(float* c, u64 x, u64 w) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k16" WIDE_TYPES
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, %24, %25, 1, 1, 1, 0, 0;"
                 : EIGHT(0), EIGHT(8), EIGHT(16) : "l"(x), "l"(w));
}
template <> __device__ __forceinline__ void multiply_wide_both<64>(float* c, u64 x, u64 w) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16" WIDE_TYPES
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"
                 "%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24) : "l"(x), "l"(w));
}
template <> __device__ __forceinline__ void multiply_wide_both<96>(float* c, u64 x, u64 w) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k16" WIDE_TYPES
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"
                 "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47}, %48, %49, 1, 1, 1, 0, 0;"
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40) : "l"(x), "l"(w));
}
template <> __device__ __forceinline__ void multiply_wide_both<128>(float* c, u64 x, u64 w) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16" WIDE_TYPES
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"
                 "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"
                 "%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, 1, 0, 0;"
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56) : "l"(x), "l"(w));
}
#define MULTIPLIES_BEGIN asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
#define MULTIPLIES_END asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")
#define MULTIPLIES_WAIT(n) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory")  // but for n groups
// The reverse of read_pieces_turned: a lane's part of each of four pieces of 8 x 8 goes where that reads it.
__device__ __forceinline__ void write_pieces_turned(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                 ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
#endif
#define COPIES_END asm volatile("cp.async.commit_group;")
#define COPIES_WAIT(n) asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory")  // until but n groups are there
#define ALL_COPIES_WAIT asm volatile("cp.async.wait_all;" ::: "memory")
#define MEET asm volatile("bar.sync 1, 128;" ::: "memory")  // the first four warps
#define TURN_WAIT(id) asm volatile("bar.sync %0, 64;" ::"r"(id) : "memory")
#define TURN_GIVE(id) asm volatile("bar.arrive %0, 64;" ::"r"(id) : "memory")
__device__ __forceinline__ u32 flag_read(const u32* flag) {  // and all that was seen before it was written is seen
    u32 r;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(r) : "l"(flag) : "memory");
    return r;
}
__device__ __forceinline__ void flag_set(u32* flag) {  // to 1; who reads it sees all that this thread has seen
    asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ __forceinline__ u32 flag_count(u32* flag, u32 last) {  // one more, after last 0; gives what it was
    u32 r;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(r) : "l"(flag), "r"(last) : "memory");
    return r;
}
#define SHOW_FAR_WRITES asm volatile("fence.proxy.async.global;" ::: "memory")  // to the engine, in memory that all see
#define NEXT_MAY_BEGIN asm volatile("griddepcontrol.launch_dependents;")
#define BEFORE_HAS_ENDED asm volatile("griddepcontrol.wait;" ::: "memory")
#define PAUSE asm volatile("nanosleep.u32 32;")
#define FETCH_TO_L2(p) asm volatile("prefetch.global.L2 [%0];" ::"l"(p))
#define KEEP(value) asm volatile("" : "+r"(value))
#define KEEP_FLOAT(value) asm volatile("" : "+f"(value))
#endif
