/* The part of libcuda that triton and torch's loaders of compiled kernels call, beside the runtime of runtime.c: it runs nothing either. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char line[240]; } Kernel;

static int launch(Kernel *kernel) {
    static void (*log_line)(const char *) = 0;
    if (!log_line) log_line = dlsym(RTLD_DEFAULT, "simulated_log");
    if (log_line) log_line(kernel->line);
    return 0;
}

#define ZERO(name, ...) int name(__VA_ARGS__) { return 0; }
#define GIVES(name, type, value, ...) int name(type *result, ##__VA_ARGS__) { *result = value; return 0; }

ZERO(cuInit, unsigned flags)
GIVES(cuDriverGetVersion, int, 13000)
GIVES(cuDeviceGet, int, 0, int ordinal)
GIVES(cuDeviceGetCount, int, 1)
int cuDeviceGetName(char *text, int size, int device) { snprintf(text, size, "simulated"); return 0; }
int cuDeviceGetUuid(void *result, int device) { memset(result, 0, 16); return 0; }
int cuDeviceGetUuid_v2(void *result, int device) { memset(result, 0, 16); return 0; }
int cudaDeviceGetAttribute(int *, int, int);
int cuDeviceGetAttribute(int *result, int which, int device) { return cudaDeviceGetAttribute(result, which, device); }
int cuGetErrorString(int error, const char **result) { *result = "simulated error"; return 0; }
int cuGetErrorName(int error, const char **result) { *result = "simulated"; return 0; }

GIVES(cuCtxGetCurrent, void *, (void *)1)
ZERO(cuCtxSetCurrent, void *context)
ZERO(cuCtxPushCurrent, void *context)
ZERO(cuCtxPushCurrent_v2, void *context)
GIVES(cuCtxPopCurrent, void *, (void *)1)
GIVES(cuCtxPopCurrent_v2, void *, (void *)1)
GIVES(cuCtxGetDevice, int, 0)
GIVES(cuCtxGetLimit, size_t, 0, int which)
ZERO(cuCtxSetLimit, int which, size_t value)
ZERO(cuCtxSynchronize, void)
GIVES(cuDevicePrimaryCtxRetain, void *, (void *)1, int device)
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuStreamGetCtx(void *stream, void **result) { *result = (void *)1; return 0; }

GIVES(cuModuleLoadData, void *, (void *)1, const void *image)
GIVES(cuModuleLoad, void *, (void *)1, const char *file)
GIVES(cuModuleLoadDataEx, void *, (void *)1, const void *image, unsigned count, void *options, void *values)
ZERO(cuModuleUnload, void *module)
int cuModuleGetFunction(void **result, void *module, const char *name) {
    Kernel *kernel = calloc(1, sizeof(Kernel));
    snprintf(kernel->line, sizeof kernel->line, "compiled %s", name);
    *result = kernel;
    return 0;
}
int cuFuncGetAttribute(int *result, int which, void *kernel) { *result = which == 0 ? 1024 : which == 4 ? 64 : 0; return 0; }
ZERO(cuFuncSetAttribute, void *kernel, int which, int value)
ZERO(cuFuncSetCacheConfig, void *kernel, int config)
GIVES(cuOccupancyMaxActiveClusters, int, 8, void *kernel, void *config)
GIVES(cuOccupancyMaxActiveBlocksPerMultiprocessor, int, 2, void *kernel, int size, size_t shared)
int cuLaunchKernel(Kernel *kernel) { return launch(kernel); }
int cuLaunchKernelEx(const void *config, Kernel *kernel, void **arguments, void **extra) { return launch(kernel); }
int cuLaunchCooperativeKernel(Kernel *kernel) { return launch(kernel); }

int cuPointerGetAttribute(void *result, int which, uint64_t address) { *(uint64_t *)result = address; return 0; }
ZERO(cuPointerGetAttributes, unsigned count, void *which, void **results, uint64_t address)
ZERO(cuTensorMapEncodeTiled, void *map)
GIVES(cuMemGetAllocationGranularity, size_t, 2097152, void *properties, int option)

/* Virtual addresses, of which the allocator's expandable segments are made. A handle is the size of its memory. */
int simulated_take(size_t size);
void simulated_give(size_t size);
void *simulated_reserve(size_t size);
void simulated_unreserve(void *start, size_t size);
int cuMemAddressReserve(uint64_t *result, size_t size, size_t alignment, uint64_t wanted, uint64_t flags) {
    *result = (uint64_t)simulated_reserve(size);
    return 0;
}
int cuMemAddressFree(uint64_t start, size_t size) { simulated_unreserve((void *)start, size); return 0; }
int cuMemCreate(uint64_t *handle, size_t size, const void *properties, uint64_t flags) {
    if (!simulated_take(size)) return 2;
    *handle = size;
    return 0;
}
int cuMemRelease(uint64_t handle) { simulated_give(handle); return 0; }
ZERO(cuMemMap, uint64_t start, size_t size, size_t offset, uint64_t handle, uint64_t flags)
ZERO(cuMemUnmap, uint64_t start, size_t size)
ZERO(cuMemSetAccess, uint64_t start, size_t size, const void *access, size_t count)
ZERO(cuMemExportToShareableHandle, void *shared, uint64_t handle, int type, uint64_t flags)
ZERO(cuMemImportFromShareableHandle, uint64_t *handle, void *shared, int type)
/* Looked up beside these, and never called here. */
ZERO(cuMemRetainAllocationHandle, void *first)
ZERO(cuMemsetD32Async, void *first)
ZERO(cuStreamWriteValue32, void *first)
ZERO(cuCtxFromGreenCtx, void *first)
ZERO(cuGreenCtxCreate, void *first)
ZERO(cuGreenCtxDestroy, void *first)
ZERO(cuGreenCtxStreamCreate, void *first)
ZERO(cuDevSmResourceSplitByCount, void *first)
ZERO(cuDeviceGetDevResource, void *first)
ZERO(cuDevResourceGenerateDesc, void *first)
ZERO(cuMulticastAddDevice, void *first)
ZERO(cuMulticastBindMem, void *first)
ZERO(cuMulticastCreate, void *first)
ZERO(cuMulticastUnbind, void *first)
ZERO(cuMemGetAllocationPropertiesFromHandle, void *first)

int cuGetProcAddress_v2(const char *name, void **result, int version, uint64_t flags, void *status) {
    *result = dlsym(RTLD_DEFAULT, name);
    return *result ? 0 : 500;
}
