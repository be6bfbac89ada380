// Included after the source.
extern "C" void run(const Args* args, int grid_x, int grid_y) {
    for (int y = 0; y < grid_y; ++y)
        for (int x = 0; x < grid_x; ++x) {
            std::memset(shared, 0xff, sizeof shared);  // NaN, so that what is read before it is written shows
            warps.clear();
            for (int i = 0; i < WARPS; ++i) warps.push_back(std::make_unique<Warp>());
            block = std::make_unique<std::barrier<>>(WARPS * 32);
            std::vector<std::thread> threads;
            for (int i = 0; i < WARPS * 32; ++i)
                threads.emplace_back([=] {
                    threadIdx = {i, 0, 0}, blockIdx = {x, y, 0};
                    nf4_matmul(*args);
                });
            for (auto& thread : threads) thread.join();
        }
}
