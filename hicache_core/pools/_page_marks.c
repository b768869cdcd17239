/* Which pages of a pool are in use: one byte a page, flipped for many pages in one call.
 *
 * The pure Python twin is _page_marks_py.py.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* Sets the marks of ids[0 .. n - 1]; returns the first that is not a page or is set so already. */
static Py_ssize_t set_marks(char *marks, Py_ssize_t n_pages, const int32_t *ids, Py_ssize_t n, char value)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= n_pages || marks[ids[i]] == value)
            return i;
        marks[ids[i]] = value;
    }
    return n;
}

PyDoc_STRVAR(flip_doc,
             "flip(marks, page_ids, value)\n--\n\n"
             "Sets the mark, 0 or 1, of each of the int32 page_ids. False, and nothing is changed,\n"
             "if one is not a page, is marked so already, or is named twice.");

static PyObject *flip(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer marks, ids;
    int value;
    if (!PyArg_ParseTuple(args, "w*y*p", &marks, &ids, &value))
        return NULL;
    const Py_ssize_t n = ids.len / (Py_ssize_t)sizeof(int32_t);
    const Py_ssize_t n_set = set_marks(marks.buf, marks.len, ids.buf, n, (char)value);
    if (n_set < n)
        set_marks(marks.buf, marks.len, ids.buf, n_set, (char)!value);
    PyBuffer_Release(&marks);
    PyBuffer_Release(&ids);
    return PyBool_FromLong(n_set == n);
}

PyDoc_STRVAR(are_pages_doc,
             "are_pages(page_ids, n_pages)\n--\n\n"
             "Whether each of the int32 page_ids is from 0 to n_pages - 1.");

static PyObject *are_pages(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer ids;
    Py_ssize_t n_pages;
    if (!PyArg_ParseTuple(args, "y*n", &ids, &n_pages))
        return NULL;
    const int32_t *const id = ids.buf;
    const Py_ssize_t n = ids.len / (Py_ssize_t)sizeof(int32_t);
    int are = 1;
    for (Py_ssize_t i = 0; i < n; i++)
        are &= id[i] >= 0 && id[i] < n_pages;
    PyBuffer_Release(&ids);
    return PyBool_FromLong(are);
}

static PyMethodDef methods[] = {
    {"flip", flip, METH_VARARGS, flip_doc},
    {"are_pages", are_pages, METH_VARARGS, are_pages_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "hicache_core.pools._page_marks",
    .m_doc = "Marks of the pages in use; hicache_core.pools.allocator is the way in.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__page_marks(void) { return PyModuleDef_Init(&module); }
