/* Chained SHA-256 page digests and the packing of token ids.
 *
 * Written from FIPS 180-4. Two compression functions: the x86 SHA instructions where the CPU has
 * them (asked at import), and portable C everywhere else. The pure Python twin is _page_keys_py.py.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif

#define DIGEST_NBYTES 32
#define BLOCK_NBYTES 64
#define TOKEN_NBYTES 4
/* Below this much work, giving the GIL away costs more than it gives others. */
#define RELEASE_GIL_NBYTES 8192

typedef void (*compress_fn)(uint32_t state[8], const uint8_t *data, size_t n_blocks);

static const uint32_t INITIAL[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

static const uint32_t ROUND[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t load_be32(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | (uint32_t)p[3];
}

static inline void store_be32(uint8_t *p, uint32_t x) {
    p[0] = (uint8_t)(x >> 24);
    p[1] = (uint8_t)(x >> 16);
    p[2] = (uint8_t)(x >> 8);
    p[3] = (uint8_t)x;
}

static inline uint32_t rotr(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void compress_portable(uint32_t state[8], const uint8_t *data, size_t n_blocks) {
    uint32_t w[64];
    for (; n_blocks > 0; n_blocks--, data += BLOCK_NBYTES) {
        for (int t = 0; t < 16; t++) w[t] = load_be32(data + 4 * t);
        for (int t = 16; t < 64; t++) {
            uint32_t s0 = rotr(w[t - 15], 7) ^ rotr(w[t - 15], 18) ^ w[t - 15] >> 3;
            uint32_t s1 = rotr(w[t - 2], 17) ^ rotr(w[t - 2], 19) ^ w[t - 2] >> 10;
            w[t] = w[t - 16] + s0 + w[t - 7] + s1;
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int t = 0; t < 64; t++) {
            uint32_t sum1 = rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25);
            uint32_t t1 = h + sum1 + ((e & f) ^ (~e & g)) + ROUND[t] + w[t];
            uint32_t sum0 = rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22);
            uint32_t t2 = sum0 + ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + t1;
            d = c, c = b, b = a, a = t1 + t2;
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d;
        state[4] += e, state[5] += f, state[6] += g, state[7] += h;
    }
}

#ifdef HAVE_X86
/* sha256rnds2 wants the state as two vectors, (a b e f) and (c d g h), the first word highest. */
__attribute__((target("sha,sse4.1,ssse3"))) static void compress_x86(
    uint32_t state[8], const uint8_t *data, size_t n_blocks) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i abef = _mm_set_epi32((int)state[0], (int)state[1], (int)state[4], (int)state[5]);
    __m128i cdgh = _mm_set_epi32((int)state[2], (int)state[3], (int)state[6], (int)state[7]);
    for (; n_blocks > 0; n_blocks--, data += BLOCK_NBYTES) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) { /* four rounds each; w[i % 4] holds their four words */
            if (i < 4) {
                const __m128i raw = _mm_loadu_si128((const __m128i *)(data + 16 * i));
                w[i] = _mm_shuffle_epi8(raw, big_endian);
            } else {
                const __m128i w9 = _mm_alignr_epi8(w[(i + 3) % 4], w[(i + 2) % 4], 4);
                const __m128i s0 = _mm_sha256msg1_epu32(w[i % 4], w[(i + 1) % 4]);
                w[i % 4] = _mm_sha256msg2_epu32(_mm_add_epi32(s0, w9), w[(i + 3) % 4]);
            }
            const __m128i k = _mm_load_si128((const __m128i *)(ROUND + 4 * i));
            const __m128i wk = _mm_add_epi32(w[i % 4], k);
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, wk);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(wk, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    state[0] = (uint32_t)_mm_extract_epi32(abef, 3), state[1] = (uint32_t)_mm_extract_epi32(abef, 2);
    state[4] = (uint32_t)_mm_extract_epi32(abef, 1), state[5] = (uint32_t)_mm_extract_epi32(abef, 0);
    state[2] = (uint32_t)_mm_extract_epi32(cdgh, 3), state[3] = (uint32_t)_mm_extract_epi32(cdgh, 2);
    state[6] = (uint32_t)_mm_extract_epi32(cdgh, 1), state[7] = (uint32_t)_mm_extract_epi32(cdgh, 0);
}

static int cpu_has_sha(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if (!(c & bit_SSE4_1) || !(c & bit_SSSE3)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (b >> 29) & 1;
}
#endif

/* Asked once, under the interpreter's lock: in a virtual machine every cpuid is an exit to the host,
 * and takes longer than to hash a page. */
static compress_fn best_compress(void) {
    static compress_fn best = NULL;
    if (best == NULL) {
        best = compress_portable;
#ifdef HAVE_X86
        if (cpu_has_sha()) best = compress_x86;
#endif
    }
    return best;
}

/* Writes the padding of a message of message_nbytes at its end; returns its whole blocks. */
static size_t pad(uint8_t *message, size_t message_nbytes) {
    const size_t n_blocks = (message_nbytes + 9 + BLOCK_NBYTES - 1) / BLOCK_NBYTES;
    uint8_t *const end = message + n_blocks * BLOCK_NBYTES;
    memset(message + message_nbytes, 0, (size_t)(end - (message + message_nbytes)));
    message[message_nbytes] = 0x80;
    store_be32(end - 8, (uint32_t)((uint64_t)message_nbytes >> 29));
    store_be32(end - 4, (uint32_t)((uint64_t)message_nbytes << 3));
    return n_blocks;
}

static void digest_of(compress_fn compress, const uint8_t *message, size_t n_blocks, uint8_t *out) {
    uint32_t state[8];
    memcpy(state, INITIAL, sizeof state);
    compress(state, message, n_blocks);
    for (int i = 0; i < 8; i++) store_be32(out + 4 * i, state[i]);
}

/* scratch holds [parent digest | page | padding]; the padding is written once for all pages. */
static void chain(compress_fn compress, const uint8_t *tokens, size_t n_pages, size_t page_nbytes,
                  const uint8_t *parent, uint8_t *scratch, uint8_t *out) {
    if (n_pages > 0 && parent == NULL) { /* the first page of an unseeded chain stands alone */
        memcpy(scratch, tokens, page_nbytes);
        digest_of(compress, scratch, pad(scratch, page_nbytes), out);
        parent = out, tokens += page_nbytes, out += DIGEST_NBYTES, n_pages--;
    }
    const size_t n_blocks = pad(scratch, DIGEST_NBYTES + page_nbytes);
    for (; n_pages > 0; n_pages--) {
        memcpy(scratch, parent, DIGEST_NBYTES);
        memcpy(scratch + DIGEST_NBYTES, tokens, page_nbytes);
        digest_of(compress, scratch, n_blocks, out);
        parent = out, tokens += page_nbytes, out += DIGEST_NBYTES;
    }
}

static PyObject *digests_of(const Py_buffer *tokens, Py_ssize_t page_size, const Py_buffer *parent,
                            compress_fn compress) {
    if (parent->len != 0 && parent->len != DIGEST_NBYTES) {
        PyErr_SetString(PyExc_ValueError, "parent must be empty or one digest");
        return NULL;
    }
    if (page_size < 1 || page_size > PY_SSIZE_T_MAX / 8) {
        PyErr_SetString(PyExc_ValueError, "page_size must be positive");
        return NULL;
    }
    const size_t page_nbytes = (size_t)page_size * TOKEN_NBYTES;
    const size_t n_pages = (size_t)tokens->len / page_nbytes;
    PyObject *out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(n_pages * DIGEST_NBYTES));
    if (out == NULL || n_pages == 0) return out;
    uint8_t *scratch = PyMem_Malloc(DIGEST_NBYTES + page_nbytes + 2 * BLOCK_NBYTES);
    if (scratch == NULL) {
        Py_DECREF(out);
        return PyErr_NoMemory();
    }
    const uint8_t *seed = parent->len ? parent->buf : NULL;
    uint8_t *digests = (uint8_t *)PyBytes_AS_STRING(out);
    if (tokens->len < RELEASE_GIL_NBYTES) {
        chain(compress, tokens->buf, n_pages, page_nbytes, seed, scratch, digests);
    } else {
        Py_BEGIN_ALLOW_THREADS;
        chain(compress, tokens->buf, n_pages, page_nbytes, seed, scratch, digests);
        Py_END_ALLOW_THREADS;
    }
    PyMem_Free(scratch);
    return out;
}

static PyObject *digests_of_args(PyObject *args, compress_fn compress) {
    Py_buffer tokens, parent;
    Py_ssize_t page_size;
    if (!PyArg_ParseTuple(args, "y*ny*", &tokens, &page_size, &parent)) return NULL;
    PyObject *out = digests_of(&tokens, page_size, &parent, compress);
    PyBuffer_Release(&tokens);
    PyBuffer_Release(&parent);
    return out;
}

static PyObject *page_digests(PyObject *module, PyObject *args) {
    (void)module;
    return digests_of_args(args, best_compress());
}

static PyObject *page_digests_portable(PyObject *module, PyObject *args) {
    (void)module;
    return digests_of_args(args, compress_portable);
}

/* One id as u32; -1 with an exception set where it is none. A bool is not a token id. */
static int64_t id_of(PyObject *item) {
    if (PyBool_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "expected a token id, got a bool");
        return -1;
    }
    PyObject *index = PyNumber_Index(item);
    if (index == NULL) return -1;
    const unsigned long long id = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    if (id == (unsigned long long)-1 && PyErr_Occurred()) return -1;
    if (id > UINT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "a token id is larger than 2**32 - 1");
        return -1;
    }
    return (int64_t)id;
}

static PyObject *pack_ids(PyObject *module, PyObject *ids) {
    (void)module;
    if (!PyList_CheckExact(ids) && !PyTuple_CheckExact(ids)) {
        PyErr_SetString(PyExc_TypeError, "pack_ids takes a list or a tuple");
        return NULL;
    }
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(ids);
    PyObject *out = PyBytes_FromStringAndSize(NULL, n * TOKEN_NBYTES);
    if (out == NULL) return NULL;
    uint8_t *p = (uint8_t *)PyBytes_AS_STRING(out);
    for (Py_ssize_t i = 0; i < n; i++, p += TOKEN_NBYTES) {
        /* An item's __index__ may run Python, and that may shrink the list under us. */
        if (i >= PySequence_Fast_GET_SIZE(ids)) {
            PyErr_SetString(PyExc_TypeError, "the list changed while it was read");
            goto fail;
        }
        PyObject *item = PySequence_Fast_GET_ITEM(ids, i);
        Py_INCREF(item);
        const int64_t id = id_of(item);
        Py_DECREF(item);
        if (id < 0) goto fail;
        p[0] = (uint8_t)id, p[1] = (uint8_t)(id >> 8);
        p[2] = (uint8_t)(id >> 16), p[3] = (uint8_t)(id >> 24);
    }
    return out;
fail:
    Py_DECREF(out);
    return NULL;
}

static PyObject *implementation(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(best_compress() == compress_portable ? "portable" : "x86-sha");
}

static PyMethodDef methods[] = {
    {"page_digests", page_digests, METH_VARARGS,
     "page_digests(tokens, page_size, parent) -> bytes, with the best compression function"},
    {"page_digests_portable", page_digests_portable, METH_VARARGS,
     "The same in portable C, for tests and benchmarks."},
    {"pack_ids", pack_ids, METH_O, "pack_ids(ids: list | tuple) -> bytes"},
    {"implementation", implementation, METH_NOARGS, "The compression function in use."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "hicache_core.kv._page_keys",
    .m_doc = "Native page keys; hicache_core.kv.keys is the way in.",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__page_keys(void) { return PyModuleDef_Init(&definition); }
