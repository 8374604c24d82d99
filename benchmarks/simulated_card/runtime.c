/* A CUDA runtime and a cuBLAS that run nothing, so that a CUDA build of torch works on a machine without a card.
 *
 * Preloaded before torch. Memory is counted and handed out without being backed; kernels, copies and products are written into a log and
 * not run; streams and events are always done. Everything above it is real: torch's allocator, its dispatch, Inductor, triton, ptxas. So it
 * shows what is launched, what waits and what is held, and neither results (whatever comes back from the card is zero) nor times of a card.
 *
 * SIMULATED_SM (90) and SIMULATED_GB (80) choose the card, SIMULATED_PINNED_GB (no limit) how much of the host's memory may be pinned.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "driver_types.h"

typedef struct CUstream_st *Stream;
typedef struct CUevent_st *Event;
typedef struct { unsigned x, y, z; } Size3;

#define SUCCEEDS(name, ...) cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
#define ZERO(name, ...) int name(__VA_ARGS__) { return 0; }
#define GIVES(name, type, value) cudaError_t name(type *result) { *result = value; return cudaSuccess; }

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static double setting(const char *name, double otherwise) { const char *text = getenv(name); return text ? atof(text) : otherwise; }
static int capability(void) { return (int)setting("SIMULATED_SM", 90); }
static int is_hopper(void) { return capability() == 90; }
static int is_large(void) { return capability() == 90 || capability() == 100; }

/* ---- the log: one line for each launch, copy and product ---- */

static char **lines = 0;
static long line_count = 0, line_room = 0;
static int is_logging = 0;

void simulated_log(const char *line) {
    if (!is_logging) return;
    pthread_mutex_lock(&mutex);
    if (line_count == line_room) lines = realloc(lines, (line_room = line_room ? 2 * line_room : 4096) * sizeof(char *));
    lines[line_count++] = strdup(line);
    pthread_mutex_unlock(&mutex);
}
void simulated_start_log(void) { line_count = 0; is_logging = 1; }
void simulated_stop_log(void) { is_logging = 0; }
long simulated_line_count(void) { return line_count; }
const char *simulated_line(long place) { return lines[place]; }

/* ---- memory: addresses without pages behind them, counted in granules of 2 MiB ---- */

typedef struct { char *start; size_t size; } Block;
static Block *blocks = 0;
static long block_count = 0, block_room = 0;
static size_t used = 0;
static size_t total(void) { return (size_t)(setting("SIMULATED_GB", 80) * 1073741824.0); }

cudaError_t cudaMalloc(void **result, size_t size) {
    size_t taken = (size + 2097151) & ~2097151UL;
    pthread_mutex_lock(&mutex);
    int fits = used + taken <= total();
    if (fits) {
        if (block_count == block_room) blocks = realloc(blocks, (block_room = block_room ? 2 * block_room : 1024) * sizeof(Block));
        *result = mmap(0, taken, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        blocks[block_count++] = (Block){*result, taken};
        used += taken;
    }
    pthread_mutex_unlock(&mutex);
    return fits ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void *address) {
    pthread_mutex_lock(&mutex);
    for (long i = 0; address && i < block_count; i++)
        if (blocks[i].start == address) {
            used -= blocks[i].size;
            munmap(address, blocks[i].size);
            blocks[i] = blocks[--block_count];
            break;
        }
    pthread_mutex_unlock(&mutex);
    return cudaSuccess;
}

/* Memory of the driver's virtual addresses (driver.c): of the card once it is made, at an address once that is reserved. */
int simulated_take(size_t size) {
    pthread_mutex_lock(&mutex);
    int fits = used + size <= total();
    if (fits) used += size;
    pthread_mutex_unlock(&mutex);
    return fits;
}

void simulated_give(size_t size) {
    pthread_mutex_lock(&mutex);
    used -= size;
    pthread_mutex_unlock(&mutex);
}

void *simulated_reserve(size_t size) {
    pthread_mutex_lock(&mutex);
    if (block_count == block_room) blocks = realloc(blocks, (block_room = block_room ? 2 * block_room : 1024) * sizeof(Block));
    void *start = mmap(0, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    blocks[block_count++] = (Block){start, size};
    pthread_mutex_unlock(&mutex);
    return start;
}

void simulated_unreserve(void *start, size_t size) {
    pthread_mutex_lock(&mutex);
    for (long i = 0; i < block_count; i++)
        if (blocks[i].start == start) { munmap(start, size); blocks[i] = blocks[--block_count]; break; }
    pthread_mutex_unlock(&mutex);
}

static int is_on_card(const void *address) {
    int found = 0;
    pthread_mutex_lock(&mutex);
    for (long i = 0; i < block_count && !found; i++)
        found = (char *)address >= blocks[i].start && (char *)address < blocks[i].start + blocks[i].size;
    pthread_mutex_unlock(&mutex);
    return found;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all) { *all = total(); *free_bytes = *all - used; return cudaSuccess; }

/* What is pinned; and the error of the last call that failed, which is remembered until it is asked for. */
static Block *pins = 0;
static long pin_count = 0, pin_room = 0;
static size_t pinned = 0;
static cudaError_t last_error = cudaSuccess;

static cudaError_t pin(void *address, size_t size) {
    pthread_mutex_lock(&mutex);
    int fits = pinned + size <= (size_t)(setting("SIMULATED_PINNED_GB", 1048576) * 1073741824.0);
    if (fits) {
        if (pin_count == pin_room) pins = realloc(pins, (pin_room = pin_room ? 2 * pin_room : 256) * sizeof(Block));
        pins[pin_count++] = (Block){address, size};
        pinned += size;
    }
    pthread_mutex_unlock(&mutex);
    return fits ? cudaSuccess : (last_error = cudaErrorMemoryAllocation);
}
static void unpin(void *address) {
    pthread_mutex_lock(&mutex);
    for (long i = 0; i < pin_count; i++)
        if (pins[i].start == address) {
            pinned -= pins[i].size;
            pins[i] = pins[--pin_count];
            break;
        }
    pthread_mutex_unlock(&mutex);
}
size_t simulated_pinned_bytes(void) { return pinned; }
cudaError_t cudaHostAlloc(void **result, size_t size, unsigned flags) {
    if (posix_memalign(result, 4096, size ? size : 1)) return last_error = cudaErrorMemoryAllocation;
    cudaError_t error = pin(*result, size);
    if (error) free(*result);
    return error;
}
cudaError_t cudaFreeHost(void *address) { unpin(address); free(address); return cudaSuccess; }
cudaError_t cudaHostRegister(void *address, size_t size, unsigned flags) { return pin(address, size); }
cudaError_t cudaHostUnregister(void *address) { unpin(address); return cudaSuccess; }

static cudaError_t copy(void *to, const void *from, size_t size) {
    int from_card = is_on_card(from), to_card = is_on_card(to);
    char line[96];
    snprintf(line, sizeof line, "copy %s to %s %zu", from_card ? "card" : "host", to_card ? "card" : "host", size);
    simulated_log(line);
    if (!to_card && from_card) memset(to, 0, size);
    if (!to_card && !from_card) memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) { return copy(to, from, size); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, Stream s) { return copy(to, from, size); }
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, Stream s) { return copy(to, from, size); }
SUCCEEDS(cudaMemcpyToSymbol, const void *to, const void *from, size_t size, size_t offset, enum cudaMemcpyKind kind)
cudaError_t cudaMemset(void *to, int value, size_t size) { simulated_log("fill"); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, Stream s) { simulated_log("fill"); return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *result, const void *address) {
    int on_card = is_on_card(address);
    memset(result, 0, sizeof *result);
    result->type = on_card ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    result->devicePointer = (void *)address;
    result->hostPointer = on_card ? 0 : (void *)address;
    return cudaSuccess;
}

/* ---- the device ---- */

GIVES(cudaGetDeviceCount, int, 1)
GIVES(cudaGetDevice, int, 0)
GIVES(cudaDriverGetVersion, int, 13000)
GIVES(cudaRuntimeGetVersion, int, 13000)
SUCCEEDS(cudaSetDevice, int device)
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) { cudaError_t error = last_error; last_error = cudaSuccess; return error; }
SUCCEEDS(cudaDeviceSynchronize, void)
SUCCEEDS(cudaDeviceEnablePeerAccess, int device, unsigned flags)
const char *cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "no error"; }
const char *cudaGetErrorName(cudaError_t error) { return "cudaError"; }
cudaError_t cudaDeviceCanAccessPeer(int *result, int a, int b) { *result = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) { snprintf(text, size, "0000:00:00.0"); return cudaSuccess; }

static int attribute(int which) {
    switch (which) {
        case 1: return 1024;                              /* threads a block */
        case 8: return 49152;                             /* shared memory a block */
        case 10: return 32;                               /* threads a warp */
        case 12: case 82: return 65536;                   /* registers a block, a multiprocessor */
        case 13: return 1755000;                          /* kHz */
        case 16: return is_hopper() ? 132 : 128;          /* multiprocessors */
        case 36: return 2619000;                          /* kHz of the memory */
        case 37: return 5120;                             /* bits of its bus */
        case 38: return 52428800;                         /* L2 */
        case 39: return is_large() ? 2048 : 1536;         /* threads a multiprocessor */
        case 75: return capability() / 10;
        case 76: return capability() % 10;
        case 81: return is_hopper() ? 233472 : 102400;    /* shared memory a multiprocessor */
        case 97: return is_large() ? 232448 : 101376;     /* shared memory a block that asks for it */
        case 106: return 32;                              /* blocks a multiprocessor */
        default: return 1;
    }
}
cudaError_t cudaDeviceGetAttribute(int *result, enum cudaDeviceAttr which, int device) { *result = attribute(which); return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "simulated sm_%d", capability());
    p->totalGlobalMem = total();
    p->major = attribute(75), p->minor = attribute(76);
    p->multiProcessorCount = attribute(16);
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = attribute(1);
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->warpSize = attribute(10);
    p->sharedMemPerBlock = attribute(8), p->sharedMemPerBlockOptin = attribute(97), p->sharedMemPerMultiprocessor = attribute(81);
    p->regsPerBlock = p->regsPerMultiprocessor = p->totalConstMem = attribute(82);
    p->l2CacheSize = attribute(38), p->memoryBusWidth = attribute(37);
    p->maxThreadsPerMultiProcessor = attribute(39), p->maxBlocksPerMultiProcessor = attribute(106);
    p->concurrentKernels = p->unifiedAddressing = p->ECCEnabled = 1, p->asyncEngineCount = 3;
    return cudaSuccess;
}

/* ---- streams and events: always done ---- */

struct CUevent_st { int unused; };
static long next_stream = 0x1000;
cudaError_t cudaStreamCreate(Stream *s) { *s = (Stream)(next_stream += 16); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(Stream *s, unsigned flags, int priority) { return cudaStreamCreate(s); }
cudaError_t cudaStreamIsCapturing(Stream s, enum cudaStreamCaptureStatus *result) { *result = 0; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(Stream s, enum cudaStreamCaptureStatus *status, unsigned long long *id, void *g, void *d, void *e,
                                     size_t *n) {
    if (status) *status = 0;
    if (id) *id = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(Stream s, int *result) { *result = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaStreamAddCallback(Stream s, void (*f)(Stream, cudaError_t, void *), void *data, unsigned flags) { f(s, 0, data); return 0; }
cudaError_t cudaLaunchHostFunc(Stream s, void (*f)(void *), void *data) { f(data); return cudaSuccess; }
SUCCEEDS(cudaStreamDestroy, Stream s)
SUCCEEDS(cudaStreamQuery, Stream s)
SUCCEEDS(cudaStreamSynchronize, Stream s)
SUCCEEDS(cudaStreamWaitEvent, Stream s, Event e, unsigned flags)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode)
cudaError_t cudaEventCreate(Event *e) { *e = malloc(sizeof **e); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(Event *e, unsigned flags) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(Event e) { free(e); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, Event a, Event b) { *ms = 1.0f; return cudaSuccess; }
SUCCEEDS(cudaEventRecord, Event e, Stream s)
SUCCEEDS(cudaEventRecordWithFlags, Event e, Stream s, unsigned flags)
SUCCEEDS(cudaEventQuery, Event e)
SUCCEEDS(cudaEventSynchronize, Event e)

/* ---- kernels: compiled ones register their names when torch is loaded ---- */

typedef struct { const void *function; const char *name; } Kernel;
static Kernel *kernels = 0;
static long kernel_count = 0, kernel_room = 0, sorted_count = 0;

void **__cudaRegisterFatBinary(void *binary) { static void *handle[4]; return handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int e, size_t size, int c, int g) {}
void __cudaRegisterFunction(void **handle, const char *function, char *d, const char *name, int t, void *a, void *b, void *c, void *e,
                            int *w) {
    if (kernel_count == kernel_room) kernels = realloc(kernels, (kernel_room = kernel_room ? 2 * kernel_room : 65536) * sizeof(Kernel));
    kernels[kernel_count++] = (Kernel){function, name};
}
static int by_address(const void *a, const void *b) {
    const void *left = ((Kernel *)a)->function, *right = ((Kernel *)b)->function;
    return left < right ? -1 : left > right;
}
static cudaError_t launch(const void *function) {
    if (!is_logging) return cudaSuccess;
    if (sorted_count != kernel_count) qsort(kernels, sorted_count = kernel_count, sizeof(Kernel), by_address);
    Kernel key = {function, 0}, *found = bsearch(&key, kernels, kernel_count, sizeof(Kernel), by_address);
    char line[4000];
    snprintf(line, sizeof line, "kernel %s", found ? found->name : "?");
    simulated_log(line);
    return cudaSuccess;
}

static __thread struct { Size3 grid, block; size_t shared; void *stream; } pushed;
unsigned __cudaPushCallConfiguration(Size3 grid, Size3 block, size_t shared, void *stream) {
    pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(Size3 *grid, Size3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void **)stream = pushed.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(void **result, const void *function) { *result = (void *)function; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(void *f, Size3 grid, Size3 block, void **arguments, size_t shared, Stream s) { return launch(f); }
cudaError_t cudaLaunchKernel(const void *f, Size3 grid, Size3 block, void **arguments, size_t shared, Stream s) { return launch(f); }
cudaError_t cudaLaunchCooperativeKernel(const void *f, Size3 grid, Size3 block, void **a, size_t shared, Stream s) { return launch(f); }
cudaError_t cudaLaunchKernelExC(const void *configuration, const void *f, void **arguments) { return launch(f); }
SUCCEEDS(cudaFuncSetAttribute, const void *f, enum cudaFuncAttribute which, int value)
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *result, const void *f) {
    memset(result, 0, sizeof *result);
    result->maxThreadsPerBlock = 1024, result->numRegs = 64, result->ptxVersion = result->binaryVersion = capability();
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **result, const void *symbol) { *result = (void *)symbol; return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int size, size_t shared, unsigned flags) {
    *n = 2;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **result, unsigned version, unsigned long long flags, int *status) {
    static void *driver = 0;
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW);
    *result = driver ? dlsym(driver, name) : 0;
    if (status) *status = *result ? 0 : 1;
    return *result ? cudaSuccess : cudaErrorSymbolNotFound;
}

/* ---- cuBLAS: a line for each product, with its sizes and whether it adds ---- */

static int math_mode = 0;
int cublasCreate_v2(void **handle) { static char memory[4096]; *handle = memory; return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = math_mode; return 0; }
int cublasSetMathMode(void *handle, int mode) { math_mode = mode; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
ZERO(cublasSetPointerMode_v2, void *handle, int mode)
ZERO(cublasDestroy_v2, void *handle)
ZERO(cublasSetStream_v2, void *handle, void *stream)
ZERO(cublasSetWorkspace_v2, void *handle, void *workspace, size_t size)

static int product(long m, long n, long k, float beta, int type) {
    char line[128];
    snprintf(line, sizeof line, "product %ldx%ldx%ld%s type %d", m, n, k, beta ? " added" : "", type);
    simulated_log(line);
    return 0;
}
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type, int la, const void *b,
                 int type_b, int lb, const void *beta, void *c, int type_c, int lc, int compute, int algorithm) {
    return product(m, n, k, *(float *)beta, type);
}
int cublasSgemm_v2(void *h, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int la, const float *b, int lb,
                   const float *beta, float *c, int lc) {
    return product(m, n, k, *beta, 0);
}
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type, int la,
                               long long sa, const void *b, int type_b, int lb, long long sb, const void *beta, void *c, int type_c,
                               int lc, long long sc, int count, int compute, int algorithm) {
    return product(m, n, k, *(float *)beta, type);
}
int cublasSgemmStridedBatched(void *h, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int la, long long sa,
                              const float *b, int lb, long long sb, const float *beta, float *c, int lc, long long sc, int count) {
    return product(m, n, k, *beta, 0);
}

typedef struct { long type; unsigned long long rows, columns; } Layout;
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulDescCreate(void **result, int compute, int scale) { *result = calloc(1, 256); return 0; }
int cublasLtMatmulDescDestroy(void *description) { free(description); return 0; }
int cublasLtMatmulPreferenceCreate(void **result) { *result = calloc(1, 64); return 0; }
int cublasLtMatmulPreferenceDestroy(void *preference) { free(preference); return 0; }
int cublasLtMatrixLayoutCreate(void **result, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    Layout *layout = calloc(1, sizeof(Layout));
    layout->type = type, layout->rows = rows, layout->columns = columns;
    *result = layout;
    return 0;
}
int cublasLtMatrixLayoutDestroy(void *layout) { free(layout); return 0; }
ZERO(cublasLtMatmulDescSetAttribute, void *description, int which, const void *value, size_t size)
ZERO(cublasLtMatmulPreferenceSetAttribute, void *preference, int which, const void *value, size_t size)
ZERO(cublasLtMatrixLayoutSetAttribute, void *layout, int which, const void *value, size_t size)
typedef struct { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; } Heuristic;
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int n, Heuristic *result, int *found) {
    memset(result, 0, sizeof *result);
    *found = 1;
    return 0;
}
int cublasLtMatmul(void *h, void *d, const void *alpha, const void *a, Layout *la, const void *b, Layout *lb, const void *beta,
                   const void *c, Layout *lc, void *result, Layout *lr, const void *algorithm, void *workspace, size_t size, void *stream) {
    return product(lr->rows, lr->columns, la->rows == lr->rows ? la->columns : la->rows, beta ? *(float *)beta : 0, la->type);
}
