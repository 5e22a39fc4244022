#define FGA_MODULE "_cuda"
#define FGA_MODULE_INIT PyInit__cuda
#include "py.c"
