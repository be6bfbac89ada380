// x A^T of hundreds or thousands of rows: low_blocks.cu by all blocks of a launch; what it is for: low_rank_cuda.py.
// Compiled at run time behind instructions.cu and low_blocks.cu, with what the latter says given, LOW_BOX 64, and:
//   TWICE  written to a second place, too

#define WARPS 5  // four that multiply, and one that asks for x and A

struct Args {
    Map x, a;      // in blocks of 64 rows, of RANKS; 64 columns
    u16 *low, *also;
    float* parts;  // for each 64 rows
    u32* flags;    // likewise, 32 apart
    int low_stride, also_stride, rows, ranks, inputs;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) low_rank(const __grid_constant__ Args args) {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32, of = blockIdx.x / LOW;
    const Low low = {args.low, args.parts + (u64)of * (RUNS * 64 * RANKS), args.flags + of * 32,
                     args.low_stride, args.rows, args.ranks, args.inputs,
#ifdef TWICE
                     args.also, args.also_stride,
#endif
    };
    make_low(low, args.x, args.a, of * 64, blockIdx.x % LOW, warp, lane);
}
