// The causal depthwise convolution, forward and backward. A vector holds neighbouring channels (a block); a task is one
// sequence and a range of blocks. It takes some blocks at a time, whose filters stay in the cache, and goes through time
// row by row: neighbouring blocks of one row lie side by side in memory, steps of one block do not.
#include "../native.h"

namespace {

enum { X, WEIGHT, BIAS, INITIAL, SEGMENTS, Y, FINAL };
enum { DY = Y, DFINAL, DX, DWEIGHT, DBIAS, DINITIAL };

// Steps for which the backward pass keeps the gradients of what was filtered, and blocks that go through time together.
constexpr int64_t STRETCH = 32, TOGETHER = 32;

struct Call {
    const View* v;
    int64_t threads, sequences, channels, width, silu, parts;

    Call(const View* views, const int64_t* n)
        : v(views), threads(n[0]), sequences(n[1]), channels(n[2]), width(n[3]), silu(n[4]), parts(n[5]) {}
};

// A block of channels of one sequence. Steps count from the sequence's start; those before it are in the state.
template <class S>
struct Block {
    using M = Math<S>;
    using V = typename M::V;
    const Call& call;
    int64_t row, start, length, sequence, channel;
    int width;
    V bias;
    V* taps;

    Block(const Call& call, int64_t sequence, int64_t index, V* taps) : call(call), sequence(sequence), taps(taps) {
        const int64_t* at = call.v[SEGMENTS].template at<int64_t>(sequence);
        row = at[0], start = at[1], length = at[2] - at[1];
        channel = index * M::lanes;
        width = int(std::min<int64_t>(M::lanes, call.channels - channel));
        bias = call.v[BIAS] ? M::load(call.v[BIAS].template at<S>(channel), width) : V{};
        for (int64_t lag = 0; lag < call.width; lag++)
            taps[lag] = M::gather(call.v[WEIGHT].template at<S>(channel) + call.width - 1 - lag, call.width, width);
    }

    V load(const View& view, int64_t t) const { return M::load(view.at<S>(row, start + t) + channel, width); }
    void store(const View& view, int64_t t, V value) const {
        M::store(view.at<S>(row, start + t) + channel, value, width);
    }

    // Entry k of a state (sequence, channel, width - 1).
    V load_state(const View& view, int64_t k) const {
        return view ? M::gather(view.at<S>(sequence, channel) + k, view.stride[1], width) : V{};
    }
    void store_state(const View& view, int64_t k, V value) const {
        for (int i = 0; i < width; i++) view.at<S>(sequence, channel + i)[k] = value[i];
    }

    V input(int64_t t) const {
        return t >= 0 ? load(call.v[X], t) : load_state(call.v[INITIAL], t + call.width - 1);
    }
};

// W taps, or as many as there are where W is 0: four are worth loops of a known length.
template <class S, int W>
inline __attribute__((always_inline)) typename Math<S>::V filtered(const Block<S>& block, int64_t t) {
    const int64_t w = W ? W : block.call.width;
    auto z = block.bias;
    if (t >= w - 1) {
        const S* x = block.call.v[X].template at<S>(block.row, block.start + t) + block.channel;
        for (int64_t lag = 0; lag < w; lag++)
            z += block.taps[lag] * Math<S>::load(x - lag * block.call.v[X].stride[1], block.width);
    } else {
        for (int64_t lag = 0; lag < w; lag++) z += block.taps[lag] * block.input(t - lag);
    }
    return z;
}

template <class S, int W>
void forward(const Block<S>* blocks, int64_t count) {
    const Call& call = blocks->call;
    for (int64_t t = 0; t < blocks->length; t++)
        for (int64_t j = 0; j < count; j++) {
            auto z = filtered<S, W>(blocks[j], t);
            if (call.silu) z *= Math<S>::sigmoid(z);
            blocks[j].store(call.v[Y], t, z);
        }
    for (int64_t j = 0; j < count; j++)
        for (int64_t k = 0; k < call.width - 1; k++)
            blocks[j].store_state(call.v[FINAL], k, blocks[j].input(blocks[j].length - (call.width - 1) + k));
}

// The gradients of the filtered inputs of steps begin ... end - 1; zero outside of the sequence.
template <class S, int W>
void gradients(const Block<S>* blocks, int64_t count, int64_t begin, int64_t end, typename Math<S>::V* dz) {
    using V = typename Math<S>::V;
    const Call& call = blocks->call;
    for (int64_t t = begin; t < end; t++)
        for (int64_t j = 0; j < count; j++) {
            V d = {};
            if (t >= 0 && t < blocks->length) {
                d = blocks[j].load(call.v[DY], t);
                if (call.silu) {
                    const V z = filtered<S, W>(blocks[j], t), s = Math<S>::sigmoid(z);
                    d *= s + z * s * (1 - s);
                }
            }
            dz[(t - begin) * count + j] = d;
        }
}

template <class S, int W>
void backward(const Block<S>* blocks, int64_t count, typename Math<S>::V* dz, typename Math<S>::V* sums) {
    using V = typename Math<S>::V;
    const Call& call = blocks->call;
    const int64_t w = W ? W : call.width, length = blocks->length, kept = length - (w - 1);
    std::fill(sums, sums + count * (w + 1), V{});
    // The gradients of the state are those of the steps before the first.
    for (int64_t begin = 1 - w; begin < length; begin += STRETCH) {
        const int64_t end = std::min(begin + STRETCH, length);
        gradients<S, W>(blocks, count, begin, end + w - 1, dz);
        for (int64_t t = begin; t < end; t++)
            for (int64_t j = 0; j < count; j++) {
                const Block<S>& block = blocks[j];
                const V* here = dz + (t - begin) * count + j;
                V dx = t >= kept ? block.load_state(call.v[DFINAL], t - kept) : V{};
                for (int64_t lag = 0; lag < w; lag++) dx += block.taps[lag] * here[lag * count];
                const V x = block.input(t);
                for (int64_t lag = 0; lag < w; lag++) sums[j * (w + 1) + lag] += x * here[lag * count];
                sums[j * (w + 1) + w] += *here;
                if (t < 0)
                    block.store_state(call.v[DINITIAL], t + w - 1, dx);
                else
                    block.store(call.v[DX], t, dx);
            }
    }
    for (int64_t j = 0; j < count; j++) {
        const Block<S>& block = blocks[j];
        for (int64_t lag = 0; lag < w; lag++) block.store_state(call.v[DWEIGHT], w - 1 - lag, sums[j * (w + 1) + lag]);
        Math<S>::store(call.v[DBIAS].template at<S>(block.sequence) + block.channel, sums[j * (w + 1) + w], block.width);
    }
}

template <class S, int W>
void walk(const Call& call, bool back) {
    using M = Math<S>;
    using V = typename M::V;
    const int64_t blocks = (call.channels + M::lanes - 1) / M::lanes, w = call.width;
    const int64_t tasks = call.sequences * call.parts;
#pragma omp parallel for num_threads(std::min(call.threads, tasks)) schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t sequence = task / call.parts, part = task % call.parts;
        const int64_t last = blocks * (part + 1) / call.parts;
        std::vector<V> taps(TOGETHER * w), sums(TOGETHER * (w + 1)), dz(back ? TOGETHER * (STRETCH + w) : 0);
        for (int64_t first = blocks * part / call.parts; first < last; first += TOGETHER) {
            const int64_t count = std::min(TOGETHER, last - first);
            std::vector<Block<S>> together;
            for (int64_t j = 0; j < count; j++) together.emplace_back(call, sequence, first + j, &taps[j * w]);
            if (back)
                backward<S, W>(together.data(), count, dz.data(), sums.data());
            else
                forward<S, W>(together.data(), count);
        }
    }
}

// A single step of every sequence, on one thread: what `walk` prepares would take longer than the work.
template <class S, int W>
void step(const Call& call) {
    using M = Math<S>;
    using V = typename M::V;
    const int64_t w = W ? W : call.width;
    for (int64_t sequence = 0; sequence < call.sequences; sequence++)
        for (int64_t channel = 0; channel < call.channels; channel += M::lanes) {
            const int width = int(std::min<int64_t>(M::lanes, call.channels - channel));
            const S* taps = call.v[WEIGHT].at<S>(channel);
            const S* before = call.v[INITIAL] ? call.v[INITIAL].at<S>(sequence, channel) : nullptr;
            S* after = w > 1 ? call.v[FINAL].at<S>(sequence, channel) : nullptr;
            const V x = M::load(call.v[X].at<S>(sequence) + channel, width);
            V z = call.v[BIAS] ? M::load(call.v[BIAS].at<S>(channel), width) : V{};
            for (int i = 0; i < width; i++) {
                S sum = taps[i * w + w - 1] * x[i];
                for (int64_t j = 0; j < w - 1; j++) {
                    if (before) sum += taps[i * w + j] * before[i * (w - 1) + j];
                    after[i * (w - 1) + j] = j + 1 < w - 1 ? (before ? before[i * (w - 1) + j + 1] : S(0)) : x[i];
                }
                z[i] += sum;
            }
            if (call.silu) z *= M::sigmoid(z);
            M::store(call.v[Y].at<S>(sequence) + channel, z, width);
        }
}

template <class S>
void run_step(const View* views, const int64_t* numbers) {
    const Call call(views, numbers);
    call.width == 4 ? step<S, 4>(call) : step<S, 0>(call);
}

template <class S>
void run(const View* views, const int64_t* numbers, bool back) {
    const Call call(views, numbers);
    call.width == 4 ? walk<S, 4>(call, back) : walk<S, 0>(call, back);
}

}  // namespace

extern "C" {
void short_conv_step_float(const View* v, const int64_t* n) { run_step<float>(v, n); }
void short_conv_step_double(const View* v, const int64_t* n) { run_step<double>(v, n); }
void short_conv_forward_float(const View* v, const int64_t* n) { run<float>(v, n, false); }
void short_conv_forward_double(const View* v, const int64_t* n) { run<double>(v, n, false); }
void short_conv_backward_float(const View* v, const int64_t* n) { run<float>(v, n, true); }
void short_conv_backward_double(const View* v, const int64_t* n) { run<double>(v, n, true); }
}
