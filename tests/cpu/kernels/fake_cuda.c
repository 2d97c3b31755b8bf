// A stand-in for CUDA's driver: it writes down what it is asked for and does nothing.
//
// FAKE_CUDA_LOG names the file, FAKE_CUDA_FAIL a call that is to fail, FAKE_CUDA_PARAMETERS how many pointers to
// parameters of eight bytes a launch has: a driver knows that from the code.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

static void *current;
static int context, module, function;

static int call(const char *name, const char *format, ...) {
  FILE *log = fopen(getenv("FAKE_CUDA_LOG"), "a");
  va_list rest;
  va_start(rest, format);
  fprintf(log, "%s", name);
  vfprintf(log, format, rest);
  fprintf(log, "\n");
  va_end(rest);
  fclose(log);
  const char *fails = getenv("FAKE_CUDA_FAIL");
  return fails && !strcmp(fails, name) ? 209 : 0;  // CUDA_ERROR_NO_BINARY_FOR_GPU
}

EXPORT int cuInit(unsigned flags) { return call("cuInit", " %u", flags); }

EXPORT int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}

EXPORT int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return call("cuDeviceGet", " %d", ordinal);
}

EXPORT int cuDevicePrimaryCtxRetain(void **found, int device) {
  *found = &context;
  return call("cuDevicePrimaryCtxRetain", " %d", device);
}

EXPORT int cuCtxGetCurrent(void **found) {
  *found = current;
  return 0;
}

EXPORT int cuCtxPushCurrent(void *entered) {
  current = entered;
  return call("cuCtxPushCurrent", " %s", entered == &context ? "own" : "other");
}

EXPORT int cuCtxPopCurrent(void **left) {
  *left = current;
  current = NULL;
  return call("cuCtxPopCurrent", "");
}

EXPORT int cuModuleLoadData(void **found, const char *image) {
  *found = &module;
  return call("cuModuleLoadData", " %s %s", image, current == &context ? "inside" : "outside");
}

EXPORT int cuModuleGetFunction(void **found, void *of, const char *name) {
  *found = &function;
  return call("cuModuleGetFunction", " %d %s", of == &module, name);
}

EXPORT int cuFuncSetCacheConfig(void *of, int config) {
  return call("cuFuncSetCacheConfig", " %d %d", of == &function, config);
}

EXPORT int cuFuncSetAttribute(void *of, int attribute, int value) {
  return call("cuFuncSetAttribute", " %d %d %d", of == &function, attribute, value);
}

EXPORT int cuLaunchKernel(void *of, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, void *stream, void **parameters, void **extra) {
  char text[4096] = "";
  int count = atoi(getenv("FAKE_CUDA_PARAMETERS"));
  for (int i = 0; i < count; i++) {
    uint64_t value;
    memcpy(&value, parameters[i], sizeof value);
    sprintf(text + strlen(text), " %" PRIx64, value);
  }
  return call("cuLaunchKernel", " %d %s %u,%u,%u %u,%u,%u %u %" PRIxPTR " %d%s", of == &function,
              current == &context ? "inside" : "outside", gx, gy, gz, bx, by, bz, shared, (uintptr_t)stream,
              extra != NULL, text);
}

EXPORT int cuGetProcAddress_v2(const char *symbol, void **found, int version, uint64_t flags, int *status) {
  (void)version, (void)flags;
  *found = dlsym(RTLD_DEFAULT, symbol);
  if (!*found) {
    static void *self;
    if (!self) self = dlopen("libcuda.so.1", RTLD_NOW);
    *found = dlsym(self, symbol);
  }
  if (status) *status = *found ? 0 : 1;
  return *found ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}

EXPORT int cuGetProcAddress(const char *symbol, void **found, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, found, version, flags, NULL);
}
