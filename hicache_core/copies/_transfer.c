/* Copies rows of pages between a device pool and a host pool, both in this process's memory,
 * without Python's lock.
 *
 * A plan says where the rows of one component in one layer lie on both sides:
 *
 *     row (page, token) of a side starts at  base + page * page_stride + token * token_stride
 *
 * The caller guarantees that the addresses belong to memory that outlives the call.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* A call of at least this many bytes stores past the cache: it would only push out what compute
 * needs, and a plain store reads every line before it writes it, half as much again of traffic. */
#define STREAM_NBYTES (4 << 20)

/* Rows that are copied at the same time, a line of each in turn: memory answers several streams
 * faster than one (measured: 9.8 GB/s with one, 12.2 with four, 9.8 with eight). Not so where the
 * rows that are written lie far apart: there, 10.2 with one and 9.4 with four. */
#define LANES 4
#define LINE_NBYTES 64

typedef struct {
    int64_t base, page_stride, token_stride;
} side_t;

/* Same order as in native.py: eight 64-bit integers. */
typedef struct {
    side_t device, host;
    int64_t row_nbytes, n_tokens;
} plan_t;

typedef struct {
    const int32_t *ids;
    Py_ssize_t n, pool;
} pages_t;

/* Rows 0 .. n_rows - 1 of n bytes each, a stride apart on either side. */
typedef struct {
    char *dst;
    const char *src;
    int64_t dst_stride, src_stride, n, n_rows;
} rows_t;

static void copy_plain(const rows_t *r, int64_t first)
{
    for (int64_t i = first; i < r->n_rows; i++)
        memcpy(r->dst + i * r->dst_stride, r->src + i * r->src_stride, r->n);
}

#if defined(__SSE2__)
static inline void stream_line(char *dst, const char *src)
{
    __m128i a = _mm_loadu_si128((const __m128i *)src);
    __m128i b = _mm_loadu_si128((const __m128i *)(src + 16));
    __m128i c = _mm_loadu_si128((const __m128i *)(src + 32));
    __m128i d = _mm_loadu_si128((const __m128i *)(src + 48));
    _mm_stream_si128((__m128i *)dst, a);
    _mm_stream_si128((__m128i *)(dst + 16), b);
    _mm_stream_si128((__m128i *)(dst + 32), c);
    _mm_stream_si128((__m128i *)(dst + 48), d);
}

static int can_stream(const rows_t *r)
{
    return r->n % LINE_NBYTES == 0 && (uintptr_t)r->dst % 16 == 0 && r->dst_stride % 16 == 0;
}

/* A single long row becomes LANES rows, if it can be cut into whole lines. */
static rows_t in_lanes(rows_t r)
{
    if (r.n_rows == 1 && r.n % (LANES * LINE_NBYTES) == 0) {
        r.n /= LANES;
        r.dst_stride = r.src_stride = r.n;
        r.n_rows = LANES;
    }
    return r;
}

/* Copies rows in groups of `lanes`; returns the first row that is left over. */
static inline int64_t stream_rows(const rows_t *r, const int lanes)
{
    int64_t first = 0;
    for (; first + lanes <= r->n_rows; first += lanes) {
        char *dst = r->dst + first * r->dst_stride;
        const char *src = r->src + first * r->src_stride;
        for (int64_t at = 0; at < r->n; at += LINE_NBYTES)
            for (int lane = 0; lane < lanes; lane++)
                stream_line(dst + lane * r->dst_stride + at, src + lane * r->src_stride + at);
    }
    return first;
}

static void copy_stream(const rows_t *row)
{
    rows_t r = in_lanes(*row);
    int64_t first = 0;
    if (can_stream(&r))
        first = r.dst_stride == r.n ? stream_rows(&r, LANES) : stream_rows(&r, 1);
    copy_plain(&r, first);
}

static void fence(void) { _mm_sfence(); }
#else
static void copy_stream(const rows_t *row) { copy_plain(row, 0); }
static void fence(void) {}
#endif

static char *address(const side_t *side, int32_t page)
{
    return (char *)(intptr_t)(side->base + page * side->page_stride);
}

static rows_t rows_of(const plan_t *plan, int32_t device_page, int32_t host_page, int to_host)
{
    const side_t *from = to_host ? &plan->device : &plan->host;
    const side_t *to = to_host ? &plan->host : &plan->device;
    return (rows_t){
        .dst = address(to, to_host ? host_page : device_page),
        .src = address(from, to_host ? device_page : host_page),
        .dst_stride = to->token_stride,
        .src_stride = from->token_stride,
        .n = plan->row_nbytes,
        .n_rows = plan->n_tokens,
    };
}

static int64_t nbytes_of(const plan_t *plans, Py_ssize_t n_plans, Py_ssize_t n_pages)
{
    int64_t nbytes = 0;
    for (Py_ssize_t i = 0; i < n_plans; i++)
        nbytes += plans[i].row_nbytes * plans[i].n_tokens;
    return nbytes * n_pages;
}

/* Page by page, so that a page of the host, which is one block in most layouts, stays near. */
static void copy_pages(const plan_t *plans, Py_ssize_t n_plans, const pages_t *device,
                       const pages_t *host, int to_host)
{
    int stream = nbytes_of(plans, n_plans, device->n) >= STREAM_NBYTES;
    for (Py_ssize_t j = 0; j < device->n; j++)
        for (Py_ssize_t i = 0; i < n_plans; i++) {
            rows_t rows = rows_of(&plans[i], device->ids[j], host->ids[j], to_host);
            if (stream)
                copy_stream(&rows);
            else
                copy_plain(&rows, 0);
        }
    fence();
}

static int are_pages(const pages_t *pages)
{
    for (Py_ssize_t i = 0; i < pages->n; i++)
        if (pages->ids[i] < 0 || pages->ids[i] >= pages->pool)
            return 0;
    return 1;
}

PyDoc_STRVAR(copy_rows_doc,
             "copy_rows(plans, device_pages, n_device_pages, host_pages, n_host_pages, to_host)\n"
             "--\n\n"
             "Copies the rows that the packed plans describe, for each pair of int32 page ids.\n\n"
             "Raises ValueError if a page is not of its pool, or the pages are not pairs; nothing\n"
             "was copied then. Releases Python's lock.");

static PyObject *copy_rows(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer plans, device_ids, host_ids;
    pages_t device, host;
    int to_host, valid;

    if (!PyArg_ParseTuple(args, "y*y*ny*np", &plans, &device_ids, &device.pool, &host_ids,
                          &host.pool, &to_host))
        return NULL;
    device.ids = device_ids.buf, device.n = device_ids.len / (Py_ssize_t)sizeof(int32_t);
    host.ids = host_ids.buf, host.n = host_ids.len / (Py_ssize_t)sizeof(int32_t);
    valid = device_ids.len == host_ids.len && plans.len % (Py_ssize_t)sizeof(plan_t) == 0 &&
            are_pages(&device) && are_pages(&host);
    if (valid) {
        Py_BEGIN_ALLOW_THREADS
        copy_pages(plans.buf, plans.len / (Py_ssize_t)sizeof(plan_t), &device, &host, to_host);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&plans);
    PyBuffer_Release(&device_ids);
    PyBuffer_Release(&host_ids);
    if (!valid) {
        PyErr_SetString(PyExc_ValueError, "pages are not pairs of pages of these pools");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy_rows", copy_rows, METH_VARARGS, copy_rows_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "hicache_core.copies._transfer",
    .m_doc = "Copies rows of pages between two pools.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__transfer(void) { return PyModuleDef_Init(&module); }
