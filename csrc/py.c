/* An empty Python module: `import fga_fast._C` loads this shared object, which registers its operators.
 * Only the limited API is used, so one build serves every Python from 3.10 on. py_cuda.c is the same for the CUDA
 * object. */
#ifndef Py_LIMITED_API /* torch.utils.cpp_extension passes it, other builds may not */
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#ifndef FGA_MODULE
#define FGA_MODULE "_C"
#define FGA_MODULE_INIT PyInit__C
#endif

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, FGA_MODULE, NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC FGA_MODULE_INIT(void) {
  return PyModule_Create(&module);
}
