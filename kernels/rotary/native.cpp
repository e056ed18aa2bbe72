// Rotary positions: pairs of channels turned by angles whose cosines and sines are given, in one pass.
#include "../native.h"

namespace {

enum { X, COS, SIN, Y };

template <class S>
void turn(const View* v, const int64_t* n) {
    using M = Math<S>;
    const int64_t threads = n[0], b = n[1], t = n[2], h = n[3], k = n[4], r = n[5], pairs_adjoin = n[6], back = n[7],
                  tasks = n[8];
#pragma omp parallel for num_threads(std::min(threads, tasks)) schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t last = b * t * (task + 1) / tasks;
        for (int64_t row = b * t * task / tasks; row < last; row++) {
            const int64_t i = row / t, j = row % t;
            const S *cos = v[COS].at<S>(i, j), *sin = v[SIN].at<S>(i, j);
            const S sign = back ? S(-1) : S(1);
            for (int64_t head = 0; head < h; head++) {
                const S* x = v[X].at<S>(i, j, head);
                S* y = v[Y].at<S>(i, j, head);
                if (pairs_adjoin)
                    for (int64_t c = 0; c < r; c++) {
                        const S s = sign * sin[c];
                        y[2 * c] = x[2 * c] * cos[c] - x[2 * c + 1] * s;
                        y[2 * c + 1] = x[2 * c + 1] * cos[c] + x[2 * c] * s;
                    }
                else
                    for (int64_t c = 0; c < r; c += M::lanes) {
                        const int width = int(std::min<int64_t>(M::lanes, r - c));
                        const auto first = M::load(x + c, width), second = M::load(x + r + c, width);
                        const auto cosine = M::load(cos + c, width), sine = sign * M::load(sin + c, width);
                        M::store(y + c, first * cosine - second * sine, width);
                        M::store(y + r + c, second * cosine + first * sine, width);
                    }
                for (int64_t c = 2 * r; c < k; c++) y[c] = x[c];
            }
        }
    }
}

}  // namespace

extern "C" {
void rotary_float(const View* v, const int64_t* n) { turn<float>(v, n); }
void rotary_double(const View* v, const int64_t* n) { turn<double>(v, n); }
}
