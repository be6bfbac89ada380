// What cuda_on_cpu.h needs of C++ itself, compiled once (on_cpu.py): half of what a kernel takes to compile.
#ifndef STANDARD_H
#define STANDARD_H
#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
#endif
