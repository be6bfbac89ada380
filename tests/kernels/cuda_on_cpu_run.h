// Included after the source. ARGS: what its parameter is. Not 0: a wait did not end.
extern "C" int run(const ARGS* args, int grid_x, int grid_y, int grid_z) {
    gridDim = {grid_x, grid_y, grid_z};
    for (int i = 0; i < grid_x * grid_y * grid_z; ++i) {
        std::memset(shared, 0xff, sizeof shared);  // NaN, so that what is read before it is written shows
        ended = heard = asked = stuck = false;
        brought.clear();
        warps.clear();
        for (int j = 0; j < WARPS; ++j) warps.push_back(std::make_unique<Warp>());
        block = std::make_unique<std::barrier<>>(WARPS * 32);
        std::vector<std::thread> threads;
        for (int j = 0; j < WARPS * 32; ++j)
            threads.emplace_back([=] {
                threadIdx = {j, 0, 0}, blockIdx = {i % grid_x, i / grid_x % grid_y, i / (grid_x * grid_y)};
                KERNEL(*args);
            });
        for (auto& thread : threads) thread.join();
        if (stuck) return 1;
    }
    return 0;
}
// Begun while the kernel before runs, as late as that may make what is read.
extern "C" int run_early(const ARGS* args, int grid_x, int grid_y, Before* of) {
    before = of;
    there = false;
    const int did_not_end = run(args, grid_x, grid_y, 1);
    before = nullptr;
    return did_not_end;
}
