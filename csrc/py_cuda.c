/* An empty Python module, so that `import fga_fast._cuda` loads this shared object and runs its operator registrations.
 * Only the limited API is used: one build serves every Python from 3.10 on. */
#ifndef Py_LIMITED_API /* torch.utils.cpp_extension passes it, other builds may not */
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cuda(void) {
  return PyModule_Create(&module);
}
