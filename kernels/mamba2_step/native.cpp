// Mamba-2's step between its projections: the short convolution, the step size, the recurrence and the skip.
#include <cmath>

#include "../common/step.h"

namespace {

enum { XBC, DT, CONV_WEIGHT, CONV_BIAS, DT_BIAS, A_LOG, SKIP, WINDOW, STATE, OUTPUT, NEXT_WINDOW, FINAL };

struct Call {
    const View* v;
    int64_t threads, batch, groups, heads, keys, values, taps, tasks;

    Call(const View* views, const int64_t* n)
        : v(views), threads(n[0]), batch(n[1]), groups(n[2]), heads(n[3]), keys(n[4]), values(n[5]), taps(n[6]),
          tasks(n[7]) {}
};

// Filters the channels of a sequence into `to`, with silu, and moves its window on.
template <class S, int W>
void filter(const Call& call, int64_t b, int64_t channels, S* to) {
    using M = Math<S>;
    const int64_t w = W ? W : call.taps;
    const S *x = call.v[XBC].at<S>(b), *taps = call.v[CONV_WEIGHT].at<S>(), *bias = call.v[CONV_BIAS].at<S>();
    const S* before = w > 1 ? call.v[WINDOW].at<S>(b) : nullptr;
    S* after = w > 1 ? call.v[NEXT_WINDOW].at<S>(b) : nullptr;
    for (int64_t c = 0; c < channels; c++) {
        S sum = bias[c] + taps[c * w + w - 1] * x[c];
        for (int64_t j = 0; j < w - 1; j++) {
            sum += taps[c * w + j] * before[c * (w - 1) + j];
            after[c * (w - 1) + j] = j + 1 < w - 1 ? before[c * (w - 1) + j + 1] : x[c];
        }
        to[c] = sum;
    }
    for (int64_t c = 0; c < channels; c += M::lanes) {
        const int width = int(std::min<int64_t>(M::lanes, channels - c));
        const auto z = M::load(to + c, width);
        M::store(to + c, z * M::sigmoid(z), width);
    }
}

template <class S>
void run(const View* views, const int64_t* numbers) {
    const Call call(views, numbers);
    const View* v = call.v;
    const int64_t inner = call.heads * call.values, shared = call.groups * call.keys, channels = inner + 2 * shared;
    std::vector<S> filtered(call.batch * channels);
    for (int64_t b = 0; b < call.batch; b++)
        call.taps == 4 ? filter<S, 4>(call, b, channels, &filtered[b * channels])
                       : filter<S, 0>(call, b, channels, &filtered[b * channels]);
#pragma omp parallel for num_threads(std::min(call.threads, call.tasks)) schedule(static, 1)
    for (int64_t task = 0; task < call.tasks; task++) {
        const int64_t all = call.batch * call.heads, last = all * (task + 1) / call.tasks;
        std::vector<S> retain(call.keys), value(call.values);
        for (int64_t i = all * task / call.tasks; i < last; i++) {
            const int64_t b = i / call.heads, head = i % call.heads, group = head / (call.heads / call.groups);
            const S* x = &filtered[b * channels + head * call.values];
            const S* keys = &filtered[b * channels + inner + group * call.keys];
            const S raw = v[DT].at<S>(b)[head] + v[DT_BIAS].at<S>()[head];
            const S dt = std::max(raw, S(0)) + std::log1p(std::exp(-std::abs(raw)));
            std::fill(retain.begin(), retain.end(), std::exp(-dt * std::exp(v[A_LOG].at<S>()[head])));
            for (int64_t j = 0; j < call.values; j++) value[j] = x[j] * dt;
            S* output = v[OUTPUT].at<S>(b, head);
            step(Head<S>{keys + shared, keys, retain.data(), nullptr, value.data(), v[STATE].at<S>(b, head), output,
                         v[FINAL].at<S>(b, head), call.keys, call.values, S(1)});
            const S skip = v[SKIP].at<S>()[head];
            for (int64_t j = 0; j < call.values; j++) output[j] += x[j] * skip;
        }
    }
}

}  // namespace

extern "C" {
void mamba2_step_float(const View* v, const int64_t* n) { run<float>(v, n); }
void mamba2_step_double(const View* v, const int64_t* n) { run<double>(v, n); }
}
