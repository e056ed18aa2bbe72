// One step of the delta rule: a head's state is read from memory once and written once.
#include <cmath>

#include "../native.h"

namespace {

enum { Q, K, V_, BETA, DECAY, REMOVAL, A, B, STATE, OUTPUT, FINAL };

struct Call {
    const View* v;
    int64_t threads, batch, groups, heads, keys, values, channels, tasks;
    double scale;

    Call(const View* views, const int64_t* n)
        : v(views), threads(n[0]), batch(n[1]), groups(n[2]), heads(n[3]), keys(n[4]), values(n[5]), channels(n[6]),
          tasks(n[7]) {
        std::memcpy(&scale, n + 8, sizeof scale);
    }
};

// S <- diag(retain) S + a (bᵀ S) + k vᵀ, and scale Sᵀ q, for one vector of values: both passes are over the same lines.
template <class S>
void column(const S* coefficients, int64_t keys, int64_t values, int64_t first, const S* value, const S* state,
            S* output, S* final, S scale) {
    using M = Math<S>;
    using V = typename M::V;
    const int width = int(std::min<int64_t>(M::lanes, values - first));
    const S *retain = coefficients, *a = retain + keys, *b = a + keys, *k = b + keys, *q = k + keys;
    V read[2] = {}, sum[2] = {};
    if (state) {
        int64_t c = 0;
        for (; c + 2 <= keys; c += 2)
            for (int i = 0; i < 2; i++) read[i] += M::load(state + (c + i) * values + first, width) * b[c + i];
        if (c < keys) read[0] += M::load(state + c * values + first, width) * b[c];
        read[0] += read[1];
    }
    const V v = M::load(value + first, width);
    for (int64_t c = 0; c < keys; c++) {
        const V before = state ? M::load(state + c * values + first, width) : V{};
        const V after = before * retain[c] + read[0] * a[c] + v * k[c];
        M::store(final + c * values + first, after, width);
        sum[c % 2] += after * q[c];
    }
    M::store(output + first, (sum[0] + sum[1]) * scale, width);
}

// retain, a, b, k and q of a head, one array after the other, as the general form has them.
template <class S>
void prepare(const Call& call, int64_t batch, int64_t head, S* to) {
    const View* v = call.v;
    const int64_t n = call.keys, group = head / (call.heads / call.groups);
    S *retain = to, *a = to + n, *b = a + n, *k = b + n, *q = k + n;
    const S beta = v[BETA] ? *v[BETA].at<S>(batch, head) : S(1);
    const S* key = v[K].at<S>(batch, group);
    const S* removal = (v[REMOVAL] ? v[REMOVAL] : v[K]).at<S>(batch, group);
    std::copy_n(v[Q].at<S>(batch, group), n, q);
    for (int64_t c = 0; c < n; c++) {
        retain[c] = !v[DECAY] ? S(1) : c && !call.channels ? retain[0] : std::exp(v[DECAY].at<S>(batch, head)[c]);
        a[c] = v[A] ? v[A].at<S>(batch, group)[c] : -beta * key[c];
        // What the delta rule removes is read from the decayed state.
        b[c] = v[A] ? v[B].at<S>(batch, group)[c] : removal[c] * retain[c];
        k[c] = v[A] ? key[c] : beta * key[c];
    }
}

template <class S>
void run(const View* views, const int64_t* numbers) {
    const Call call(views, numbers);
    const View* v = call.v;
#pragma omp parallel for num_threads(std::min(call.threads, call.tasks)) schedule(static, 1)
    for (int64_t task = 0; task < call.tasks; task++) {
        const int64_t all = call.batch * call.heads, last = all * (task + 1) / call.tasks;
        std::vector<S> coefficients(5 * call.keys);
        for (int64_t i = all * task / call.tasks; i < last; i++) {
            const int64_t b = i / call.heads, head = i % call.heads;
            prepare(call, b, head, coefficients.data());
            const S* state = v[STATE] ? v[STATE].at<S>(b, head) : nullptr;
            for (int64_t first = 0; first < call.values; first += Math<S>::lanes)
                column<S>(coefficients.data(), call.keys, call.values, first, v[V_].at<S>(b, head), state,
                          v[OUTPUT].at<S>(b, head), v[FINAL].at<S>(b, head), S(call.scale));
        }
    }
}

}  // namespace

extern "C" {
void delta_rule_step_float(const View* v, const int64_t* n) { run<float>(v, n); }
void delta_rule_step_double(const View* v, const int64_t* n) { run<double>(v, n); }
}
