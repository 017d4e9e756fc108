// y = x W' + b for float32 x (n, inputs) and bfloat16 W (outputs, inputs), which is widened in registers.
//
// Generation reads every weight once for each token, so its time is that of the memory: weights of half the size take
// half of it, if they are never written out widened. Vectors of 16 floats are the compiler's own extension (GCC,
// Clang); it maps them to what the processor has.
#include <cstdint>
#include <cstring>

typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
constexpr int64_t WIDTH = 16;

static inline float widened(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;  // bfloat16 is the upper half of a float32
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

static inline floats widened(const uint16_t* from) {
    halves bits;
    memcpy(&bits, from, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

static inline floats load(const float* from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

// ROWS rows of W by TOKENS rows of x: as many sums as fit into registers, so that each loaded vector is used again.
template <int ROWS, int TOKENS>
static void tile(const float* x, const uint16_t* w, const float* bias, float* y, int64_t inputs, int64_t outputs) {
    floats sums[ROWS][TOKENS] = {};
    int64_t i = 0;
    for (; i + WIDTH <= inputs; i += WIDTH) {
        floats weights[ROWS];
        for (int r = 0; r < ROWS; r++) {
            weights[r] = widened(w + r * inputs + i);
            if (i & WIDTH) __builtin_prefetch(w + (r + ROWS) * inputs + i);  // the rows to come, every other vector
        }
        for (int t = 0; t < TOKENS; t++) {
            const floats values = load(x + t * inputs + i);
            for (int r = 0; r < ROWS; r++) sums[r][t] += weights[r] * values;
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) {
            float sum = 0;
            for (int k = 0; k < WIDTH; k++) sum += sums[r][t][k];
            for (int64_t j = i; j < inputs; j++) sum += x[t * inputs + j] * widened(w[r * inputs + j]);
            y[t * outputs + r] = sum + (bias ? bias[r] : 0);
        }
}

template <int ROWS>
static void rows(const float* x, const uint16_t* w, const float* bias, float* y, int64_t n, int64_t inputs,
                 int64_t outputs) {
    for (; n > 10 || n == 6; n -= 6, x += 6 * inputs, y += 6 * outputs) tile<ROWS, 6>(x, w, bias, y, inputs, outputs);
    for (; n > 5; n -= 5, x += 5 * inputs, y += 5 * outputs) tile<ROWS, 5>(x, w, bias, y, inputs, outputs);
    switch (n) {
        case 1: return tile<ROWS, 1>(x, w, bias, y, inputs, outputs);
        case 2: return tile<ROWS, 2>(x, w, bias, y, inputs, outputs);
        case 3: return tile<ROWS, 3>(x, w, bias, y, inputs, outputs);
        case 4: return tile<ROWS, 4>(x, w, bias, y, inputs, outputs);
        case 5: return tile<ROWS, 5>(x, w, bias, y, inputs, outputs);
    }
}

extern "C" void linear_bfloat16(const float* x, const uint16_t* w, const float* bias, float* y, int64_t n,
                                int64_t inputs, int64_t outputs) {
    constexpr int64_t ROWS = 4;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < (outputs + ROWS - 1) / ROWS; block++) {
        const int64_t o = block * ROWS;
        const float* b = bias ? bias + o : nullptr;
        if (o + ROWS <= outputs) {
            rows<ROWS>(x, w + o * inputs, b, y + o, n, inputs, outputs);
        } else {
            for (int64_t r = 0; r < outputs - o; r++)
                rows<1>(x, w + (o + r) * inputs, b ? b + r : nullptr, y + o + r, n, inputs, outputs);
        }
    }
}
