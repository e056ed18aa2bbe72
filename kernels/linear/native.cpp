// y = x Wᵀ + b for a few rows x: bound by reading W, which is gone through once, row by row as it lies in memory.
#include "../native.h"

namespace {

enum { X, WEIGHT, BIAS, Y };

// ROWS rows of x with one row of W: four running sums for a single row, so that additions do not wait for each other.
template <class S, int ROWS>
inline void row(const S* w, const S* x, int64_t stride, int64_t width, S* sums) {
    using M = Math<S>;
    using V = typename M::V;
    constexpr int SUMS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1, L = M::lanes;
    V total[ROWS][SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS * L <= width; i += SUMS * L)
#pragma GCC unroll 4
        for (int s = 0; s < SUMS; s++) {
            const V at = M::load(w + i + s * L, L);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) total[r][s] += at * M::load(x + r * stride + i + s * L, L);
        }
    for (; i < width; i += L) {
        const int left = int(std::min<int64_t>(L, width - i));
        const V at = M::load(w + i, left);
        for (int r = 0; r < ROWS; r++) total[r][0] += at * M::load(x + r * stride + i, left);
    }
    for (int r = 0; r < ROWS; r++) {
        for (int s = 1; s < SUMS; s++) total[r][0] += total[r][s];
        sums[r] = M::sum(total[r][0]);
    }
}

template <class S, int ROWS>
void rows(const View* v, int64_t first, int64_t begin, int64_t end, int64_t width) {
    const S* x = v[X].at<S>(first);
    for (int64_t o = begin; o < end; o++) {
        S sums[ROWS];
        row<S, ROWS>(v[WEIGHT].at<S>(o), x, v[X].stride[0], width, sums);
        for (int r = 0; r < ROWS; r++) v[Y].at<S>(first + r)[o] = sums[r] + (v[BIAS] ? v[BIAS].at<S>()[o] : S(0));
    }
}

template <class S>
void run(const View* v, const int64_t* n) {
    const int64_t threads = n[0], count = n[1], outputs = n[2], width = n[3], tasks = n[4];
#pragma omp parallel for num_threads(std::min(threads, tasks)) schedule(static, 1)
    for (int64_t task = 0; task < tasks; task++) {
        // A stretch of W that stays in the cache while all rows of x meet it.
        const int64_t last = outputs * (task + 1) / tasks, stretch = std::max<int64_t>(1, (1 << 15) / width);
        for (int64_t begin = outputs * task / tasks; begin < last; begin += stretch) {
            const int64_t end = std::min(begin + stretch, last);
            int64_t r = 0;
            for (; r + 4 <= count; r += 4) rows<S, 4>(v, r, begin, end, width);
            for (; r + 2 <= count; r += 2) rows<S, 2>(v, r, begin, end, width);
            for (; r < count; r++) rows<S, 1>(v, r, begin, end, width);
        }
    }
}

}  // namespace

extern "C" {
void linear_float(const View* v, const int64_t* n) { run<float>(v, n); }
void linear_double(const View* v, const int64_t* n) { run<double>(v, n); }
}
