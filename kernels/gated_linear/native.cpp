// One step of the gated linear recurrence: the state is read once and written once.
#include <cmath>

#include "../common/step.h"

namespace {

enum { Q, K, V_, DECAY, BONUS, STATE, OUTPUT, FINAL };

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

template <class S>
void run(const View* views, const int64_t* numbers) {
    const Call call(views, numbers);
    const View* v = call.v;
#pragma omp parallel for num_threads(std::min(call.threads, call.tasks)) schedule(static, 1)
    for (int64_t task = 0; task < call.tasks; task++) {
        const int64_t all = call.batch * call.heads, last = all * (task + 1) / call.tasks;
        std::vector<S> retain(call.keys, S(1));
        for (int64_t i = all * task / call.tasks; i < last; i++) {
            const int64_t b = i / call.heads, head = i % call.heads, group = head / (call.heads / call.groups);
            if (v[DECAY])
                for (int64_t c = 0; c < call.keys; c++)
                    retain[c] = c && !call.channels ? retain[0] : std::exp(v[DECAY].at<S>(b, head)[c]);
            step(Head<S>{v[Q].at<S>(b, group), v[K].at<S>(b, group), retain.data(),
                         v[BONUS] ? v[BONUS].at<S>(head) : nullptr, v[V_].at<S>(b, head),
                         v[STATE] ? v[STATE].at<S>(b, head) : nullptr, v[OUTPUT].at<S>(b, head),
                         v[FINAL].at<S>(b, head), call.keys, call.values, S(call.scale)});
        }
    }
}

}  // namespace

extern "C" {
void gated_linear_step_float(const View* v, const int64_t* n) { run<float>(v, n); }
void gated_linear_step_double(const View* v, const int64_t* n) { run<double>(v, n); }
}
