/* What a decoding step does between its products with the weights, in float32, for one new token of each row.
 *
 * `decode_kernels.py` compiles this file and says what the arguments are. A row is computed alone and in a fixed order:
 * its result depends neither on its neighbours nor on the number of threads. Sums run in LANES chains of their own, or
 * in one chain for each result, so that the compiler can vectorise them without another order of additions.
 */

#include <math.h>
#include <omp.h>
#include <string.h>

#define LANES 16

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int word __attribute__((may_alias));

/* exp(x) for x <= 0, within 2 ulp; NaN stays NaN. */
static inline float exponential(float x)
{
    float clamped = x < -87.0f ? -87.0f : x;
    float n = rintf(clamped * 1.44269504088896341f);
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int bits = (int)((unsigned)((int)n + 127) << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

static float total(const float *lanes)
{
    float sum = 0;
    for (int j = 0; j < LANES; j++)
        sum += lanes[j];
    return sum;
}

static float squares(const float *x, int size)
{
    float lanes[LANES] = {0};
    int i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int j = 0; j < LANES; j++)
            lanes[j] += x[i + j] * x[i + j];
    for (int j = 0; i + j < size; j++)
        lanes[j] += x[i + j] * x[i + j];
    return total(lanes);
}

static void normalise(const float *x, const float *weight, float eps, float *out, int size)
{
    float factor = 1.0f / sqrtf(squares(x, size) / (float)size + eps);
    for (int i = 0; i < size; i++)
        out[i] = weight[i] * (x[i] * factor);
}

/* x = softmax(x), of a multiple of LANES values. */
static void soften(float *x, long count)
{
    float highest[LANES], sums[LANES] = {0};
    for (int j = 0; j < LANES; j++)
        highest[j] = -INFINITY;
    for (long i = 0; i < count; i += LANES)
        for (int j = 0; j < LANES; j++)
            highest[j] = x[i + j] > highest[j] ? x[i + j] : highest[j];
    for (int j = 1; j < LANES; j++)
        highest[0] = highest[j] > highest[0] ? highest[j] : highest[0];
    for (long i = 0; i < count; i += LANES)
        for (int j = 0; j < LANES; j++) {
            x[i + j] = exponential(x[i + j] - highest[0]);
            sums[j] += x[i + j];
        }
    float factor = 1.0f / total(sums);
    for (long i = 0; i < count; i++)
        x[i] *= factor;
}

static void mask(float *scores, long from, long end)
{
    for (long i = from; i < end; i++)
        scores[i] = -INFINITY;
}

static long rounded_down(long count) { return count / LANES * LANES; }

static long rounded_up(long count) { return rounded_down(count + LANES - 1); }

/* out[g][j] = sum of a[g][i] * matrix[i][j] over i < count, for g < groups and j < columns. The rows of each of the
 * three lie as far apart as its stride. */
static void product(const float *a, long a_stride, long count, const float *matrix, long stride, float *out,
                    long out_stride, long columns, long groups)
{
    long first = 0;
    for (; first + 4 * LANES <= columns; first += 4 * LANES) /* four chains of additions hide each other's latency */
        for (long g = 0; g < groups; g++) {
            const float *row = matrix + first;
            vector s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, *to = (vector *)(out + g * out_stride + first);
            for (long i = 0; i < count; i++, row += stride) {
                const vector *from = (const vector *)row;
                float factor = a[g * a_stride + i];
                s0 += factor * from[0];
                s1 += factor * from[1];
                s2 += factor * from[2];
                s3 += factor * from[3];
            }
            to[0] = s0, to[1] = s1, to[2] = s2, to[3] = s3;
        }
    for (; first + LANES <= columns; first += LANES)
        for (long g = 0; g < groups; g++) {
            const float *row = matrix + first;
            vector sum = {0};
            for (long i = 0; i < count; i++, row += stride)
                sum += a[g * a_stride + i] * *(const vector *)row;
            *(vector *)(out + g * out_stride + first) = sum;
        }
    for (; first < columns; first++)
        for (long g = 0; g < groups; g++) {
            float sum = 0;
            for (long i = 0; i < count; i++)
                sum += a[g * a_stride + i] * matrix[i * stride + first];
            out[g * out_stride + first] = sum;
        }
}

static void rotate(const float *x, const float *cosines, const float *sines, int rotary, float *out, int size)
{
    int half = rotary / 2;
    for (int i = 0; i < half; i++) {
        out[i] = x[i] * cosines[i] - x[i + half] * sines[i];
        out[i + half] = x[i + half] * cosines[i + half] + x[i] * sines[i + half];
    }
    for (int i = rotary; i < size; i++)
        out[i] = x[i];
}

struct attention {
    const float *query, *key, *value;   /* (rows, heads, size), (rows, key heads, size); `key` is NULL if stored */
    const float *cosines, *sines;       /* (rows, rotary) */
    const float *query_norm, *key_norm; /* (size), or NULL */
    float *keys, *values;               /* (rows, key heads, size, columns), (rows, key heads, columns, size), with
                                         * columns that are a multiple of LANES; the prefix too */
    const float *prefix_keys, *prefix_values; /* (key heads, size, prefix columns), (key heads, prefix columns, size) */
    const long *lengths;                /* (rows): the tokens of each row, with the new one, without the prefix */
    float *out, *scratch; /* (rows, heads, size), (threads, group, 2 * size + longest) */
    long rows, heads, key_heads, size, rotary, columns, shared, prefix_columns, longest, window, threads;
    float eps, scaling, softcap;
};

static void attend_head(const struct attention *a, long row, long head, float *scratch)
{
    long group = a->heads / a->key_heads, size = a->size, length = a->lengths[row];
    float *query = scratch, *other = query + group * size, *scores = other + group * size;
    float *keys = a->keys + (row * a->key_heads + head) * size * a->columns;
    float *values = a->values + (row * a->key_heads + head) * a->columns * size;
    const float *cosines = a->cosines + row * a->rotary, *sines = a->sines + row * a->rotary;
    float *out = a->out + (row * a->heads + head * group) * size;

    for (long g = 0; g < group; g++) {
        const float *from = a->query + (row * a->heads + head * group + g) * size;
        if (a->query_norm) {
            normalise(from, a->query_norm, a->eps, other, (int)size);
            from = other;
        }
        rotate(from, cosines, sines, (int)a->rotary, query + g * size, (int)size);
        for (long i = 0; i < size; i++)
            query[g * size + i] *= a->scaling;
    }
    if (a->key) {
        const float *from = a->key + (row * a->key_heads + head) * size;
        if (a->key_norm) {
            normalise(from, a->key_norm, a->eps, other, (int)size);
            from = other;
        }
        rotate(from, cosines, sines, (int)a->rotary, out, (int)size); /* `out` is free until the end */
        for (long i = 0; i < size; i++)
            keys[i * a->columns + length - 1] = out[i];
        memcpy(values + (length - 1) * size, a->value + (row * a->key_heads + head) * size, size * sizeof(float));
    }
    /* A sliding window hides the tokens before `hidden`, counted from the start of the prefix. */
    long hidden = a->window && a->shared + length > a->window ? a->shared + length - a->window : 0;
    long prefix_start = hidden < a->shared ? rounded_down(hidden) : a->shared;
    long start = rounded_down(hidden > a->shared ? hidden - a->shared : 0);
    long shared = a->shared - prefix_start, own = length - start, own_at = rounded_up(shared);
    if (shared)
        product(query, size, size, a->prefix_keys + head * size * a->prefix_columns + prefix_start, a->prefix_columns,
                scores, a->longest, rounded_up(shared), group);
    product(query, size, size, keys + start, a->columns, scores + own_at, a->longest, rounded_up(own), group);
    for (long g = 0; g < group; g++) {
        float *x = scores + g * a->longest;
        long count = own_at + rounded_up(own);
        if (a->softcap > 0)
            for (long i = 0; i < count; i++)
                x[i] = tanhf(x[i] / a->softcap) * a->softcap;
        mask(x, 0, shared ? hidden - prefix_start : hidden - a->shared - start);
        mask(x, shared, own_at);
        mask(x, own_at + own, count);
        soften(x, count);
    }
    product(scores + own_at, a->longest, own, values + start * size, size, out, size, size, group);
    if (shared) {
        const float *prefix_values = a->prefix_values + (head * a->prefix_columns + prefix_start) * size;
        product(scores, a->longest, shared, prefix_values, size, other, size, size, group);
        for (long i = 0; i < group * size; i++)
            out[i] += other[i];
    }
}

void attend(const struct attention *a)
{
    long part = a->heads / a->key_heads * (2 * a->size + a->longest);
#pragma omp parallel num_threads(a->threads)
    {
        float *scratch = a->scratch + omp_get_thread_num() * part;
#pragma omp for schedule(dynamic, 4)
        for (long task = 0; task < a->key_heads * a->rows; task++) /* rows of one head together: they share its prefix */
            attend_head(a, task % a->rows, task / a->rows, scratch);
    }
}

/* hidden += delta, if there is one; out = RMSNorm(hidden). */
void add_norm(float *hidden, const float *delta, const float *weight, float eps, float *out, long rows, long size,
              long threads)
{
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        float *x = hidden + row * size;
        if (delta)
            for (long i = 0; i < size; i++)
                x[i] += delta[row * size + i];
        normalise(x, weight, eps, out + row * size, (int)size);
    }
}

/* gate = silu(gate) * up */
void gate(float *gate, const float *up, long rows, long size, long threads)
{
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++)
        for (long i = row * size; i < (row + 1) * size; i++) {
            float x = gate[i], e = exponential(-fabsf(x));
            gate[i] = x * ((x >= 0 ? 1.0f : e) / (1.0f + e)) * up[i];
        }
}

/* Each row of x as 8-bit integers: x = (high + low / 254) * scale, where parts = (high rows, low rows). The scale of a
 * row with NaN or infinity is not finite. */
void split(const float *x, signed char *parts, float *scales, long rows, long size, long threads)
{
    const float shift = 12582912.0f; /* a float this large ends with the bits of its integer part, rounded */
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * size;
        signed char *high = parts + row * size, *low = high + rows * size;
        int highest = 0; /* the bits of positive floats are in their order, and those of NaN are the largest */
        for (long i = 0; i < size; i++) {
            int magnitude = ((const word *)from)[i] & 0x7fffffff;
            highest = magnitude > highest ? magnitude : highest;
        }
        float most;
        memcpy(&most, &highest, sizeof most);
        most = most < 1e-30f ? 1e-30f : most;
        scales[row] = most / 127.0f;
        float factor = 127.0f / most;
        for (long i = 0; i < size; i++) {
            float value = from[i] * factor, rounded = value + shift, rest = (value - (rounded - shift)) * 254.0f + shift;
            high[i] = (signed char)*(word *)&rounded;
            low[i] = (signed char)*(word *)&rest;
        }
    }
}

/* products = (high rows, low rows); the high rows become those of the x that was split. */
void join(float *products, const float *scales, long rows, long size, long threads)
{
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        float *high = products + row * size;
        const float *low = high + rows * size;
        for (long i = 0; i < size; i++)
            high[i] = (high[i] + low[i] * (1.0f / 254.0f)) * scales[row];
    }
}
