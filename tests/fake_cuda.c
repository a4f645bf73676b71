/* A CUDA driver for a machine without a GPU: "device" memory is host memory, and every call that matters is written, one a line, to
 * the file $FAKE_CUDA_LOG. $FAKE_CUDA_KERNELS is a library with a function `emulate_NAME` for each kernel (cuda_emulation.py makes
 * it); launching a graph runs them, and nothing without it. Other variables shape the machine: FAKE_CUDA_DEVICES (1),
 * FAKE_CUDA_CAPABILITY (90), FAKE_CUDA_VERSION (13000), FAKE_CUDA_MEMORY (bytes an allocation may have), FAKE_CUDA_BROKEN (a kernel whose launch fails). */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char name[128]; } function_t;
typedef struct { int first, count; } graph_t;
typedef void (*emulation_t)(const unsigned* extents, void** arguments);
typedef struct { const char* name; emulation_t run; int arguments, gone; unsigned extents[6]; uint64_t values[64]; } launch_t;

static launch_t launches[4096];
static int launch_count, capturing, event_time;

static long setting(const char* name, long usual) { return getenv(name) ? atol(getenv(name)) : usual; }

static void note(const char* format, uint64_t a, uint64_t b, const char* text) {
  const char* path = getenv("FAKE_CUDA_LOG");
  FILE* file = path ? fopen(path, "a") : NULL;
  if (!file) return;
  fprintf(file, format, text, (unsigned long long)a, (unsigned long long)b);
  fputc('\n', file);
  fclose(file);
}

/* Notes the stream that work goes to from here on, where it is another one than before. */
static void on(void* stream) {
  static void* before;
  if (stream != before) note("%sstream %llu", (uint64_t)(uintptr_t)stream, 0, "");
  before = stream;
}

int cuInit(unsigned flags) { return (int)flags; }
int cuDriverGetVersion(int* version) { *version = (int)setting("FAKE_CUDA_VERSION", 13000); return 0; }
int cuDeviceGetCount(int* count) { *count = (int)setting("FAKE_CUDA_DEVICES", 1); return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int length, int device) { snprintf(name, (size_t)length, "Fake GPU %d", device); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = (int)setting("FAKE_CUDA_CAPABILITY", 90);
  (void)device;
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &launch_count; (void)device; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { note("%srelease", 0, 0, ""); return device * 0; }
int cuCtxPushCurrent_v2(void* context) { return context ? 0 : 201; }
int cuCtxPopCurrent_v2(void** context) { *context = NULL; return 0; }
int cuMemGetInfo_v2(size_t* unused, size_t* total) { *unused = 1000, *total = 2000; return 0; }
int cuMemAlloc_v2(uint64_t* memory, size_t bytes) {
  if ((long)bytes > setting("FAKE_CUDA_MEMORY", 1L << 30)) return 2;
  note("%salloc %llu", bytes, 0, "");
  *memory = (uint64_t)(uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
  return 0;
}
int cuMemFree_v2(uint64_t memory) { free((void*)(uintptr_t)memory); note("%sfree", 0, 0, ""); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  on(stream);
  note("%supload %llu", bytes, 0, "");
  memcpy((void*)(uintptr_t)to, from, bytes);
  return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  on(stream);
  note("%sdownload %llu", bytes, 0, "");
  memcpy(to, (void*)(uintptr_t)from, bytes);
  return 0;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  on(stream);
  note("%smove %llu", bytes, 0, "");
  memcpy((void*)(uintptr_t)to, (void*)(uintptr_t)from, bytes);
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  note("%smodule %llu", memcmp(image, "\177ELF", 4) == 0, 0, "");
  *module = &launches;
  return 0;
}
int cuModuleUnload(void* module) { note("%sunload", 0, 0, ""); return module ? 0 : 1; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  function_t* made = calloc(1, sizeof(*made));
  snprintf(made->name, sizeof(made->name), "%s", name);
  *function = made;
  return module ? 0 : 1;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  note("shared of %s: %llu", (uint64_t)value, 0, ((function_t*)function)->name);
  return attribute == 8 ? 0 : 1;
}
/* How many arguments a kernel takes, which only its emulation knows. */
static int kernel_arguments(emulation_t run, const char* name) {
  char symbol[160];
  int (*count)(void) = NULL;
  snprintf(symbol, sizeof(symbol), "arguments_of_%s", name);
  if (run) count = (int (*)(void))dlsym(dlopen(getenv("FAKE_CUDA_KERNELS"), RTLD_NOW | RTLD_LOCAL), symbol);
  return count ? count() : 0;
}

static emulation_t emulation_of(const char* name) {
  char symbol[160];
  const char* path = getenv("FAKE_CUDA_KERNELS");
  void* library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
  snprintf(symbol, sizeof(symbol), "emulate_%s", name);
  return library ? (emulation_t)dlsym(library, symbol) : NULL;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** arguments, void** extra) {
  const char* name = ((function_t*)function)->name;
  const unsigned extents[] = {gx, gy, gz, bx, by, bz};
  (void)shared;
  if (!capturing || !stream || extra) return 900;
  if (getenv("FAKE_CUDA_BROKEN") && strcmp(getenv("FAKE_CUDA_BROKEN"), name) == 0) return 1;
  launch_t* launch = &launches[launch_count++];
  launch->name = name;
  launch->run = emulation_of(name);
  launch->arguments = kernel_arguments(launch->run, name);
  memcpy(launch->extents, extents, sizeof(extents));
  for (int i = 0; i < launch->arguments; ++i) launch->values[i] = *(uint64_t*)arguments[i];
  note("capture %s %llux%llu", gx, bx, name);
  return 0;
}
/* A launch that may overlap the one before it is noted as such. */
typedef struct { int id, unused, allowed, bytes[15]; } attribute_t;
typedef struct { unsigned extents[6], shared; void* stream; const attribute_t* attributes; unsigned count; } config_t;
int cuLaunchKernelEx(const config_t* config, void* function, void** arguments, void** extra) {
  const unsigned* n = config->extents;
  if (config->count != 1 || config->attributes->id != 6 || config->attributes->allowed != 1) return 1;
  note("overlap %s", 0, 0, ((function_t*)function)->name);
  return cuLaunchKernel(function, n[0], n[1], n[2], n[3], n[4], n[5], config->shared, config->stream, arguments, extra);
}
int cuStreamCreate(void** stream, unsigned flags) { *stream = malloc(1); return flags == 1 ? 0 : 1; }
int cuStreamDestroy_v2(void* stream) { free(stream); return 0; }
int cuStreamSynchronize(void* stream) { on(stream); note("%ssynchronize", 0, 0, ""); return 0; }
int cuStreamWaitEvent(void* stream, void* event, unsigned flags) { on(stream); note("%swait", 0, 0, ""); return event ? (int)flags : 1; }
int cuStreamBeginCapture_v2(void* stream, int mode) { capturing = 1; return stream && mode == 1 ? 0 : 1; }
/* A node of a graph is its launch; graphs made of one recording share them. */
int cuStreamGetCaptureInfo_v2(void* stream, int* status, uint64_t* id, void** graph, const void* const** last, size_t* count) {
  static const void* node;
  node = &launches[launch_count - 1];
  *status = capturing, *id = 1, *graph = NULL, *last = &node, *count = 1;
  return capturing && stream ? 0 : 1;
}
int cuStreamEndCapture(void* stream, void** graph) {
  static int start;
  graph_t* made = calloc(1, sizeof(*made));
  made->first = start, made->count = launch_count - start, start = launch_count, capturing = 0;
  *graph = made;
  return stream ? 0 : 1;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  graph_t* made = malloc(sizeof(*made));
  *made = *(graph_t*)graph;
  note("%sinstantiate %llu", (uint64_t)made->count, 0, "");
  *executable = made;
  return (int)flags;
}
int cuGraphLaunch(void* executable, void* stream) {
  const graph_t* graph = executable;
  on(stream);
  note("%slaunch %llu", (uint64_t)graph->count, 0, "");
  for (launch_t* launch = launches + graph->first; launch < launches + graph->first + graph->count; ++launch) {
    void* arguments[64];
    for (int i = 0; i < 64; ++i) arguments[i] = &launch->values[i];
    if (launch->run) launch->run(launch->extents, arguments);
  }
  return 0;
}
typedef struct { void* function; unsigned extents[6], shared; void **arguments, **extra; } parameters_t;
int cuGraphExecKernelNodeSetParams(void* executable, void* node, const parameters_t* parameters) {
  const graph_t* graph = executable;
  launch_t* launch = node;
  const char* name = ((function_t*)parameters->function)->name;
  const int inside = launch >= launches + graph->first && launch < launches + graph->first + graph->count;
  if (!inside || launch->gone || strcmp(launch->name, name) || memcmp(launch->extents, parameters->extents, sizeof(launch->extents))) return 1;
  for (int i = 0; i < launch->arguments; ++i) launch->values[i] = *(uint64_t*)parameters->arguments[i];
  note("bind %s", 0, 0, name);
  return 0;
}
/* The nodes go with the graph, and what was made of it can still be launched. */
int cuGraphDestroy(void* graph) {
  const graph_t* made = graph;
  for (int i = made->first; i < made->first + made->count; ++i) launches[i].gone = 1;
  free(graph);
  return 0;
}
int cuGraphExecDestroy(void* executable) { free(executable); return 0; }
int cuEventCreate(void** event, unsigned flags) { *event = malloc(sizeof(int)); (void)flags; return 0; }
int cuEventDestroy_v2(void* event) { free(event); return 0; }
int cuEventRecord(void* event, void* stream) { on(stream); note("%srecord", 0, 0, ""); return event ? 0 : 1; }
int cuEventRecordWithFlags(void* event, void* stream, unsigned flags) {
  *(int*)event = event_time++;
  return capturing && stream && flags == 1 ? 0 : 1;
}
int cuEventElapsedTime(float* milliseconds, void* start, void* end) { *milliseconds = (float)(*(int*)end - *(int*)start); return 0; }
int cuGetErrorName(int error, const char** name) { *name = error == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_OTHER"; return 0; }
int cuGetErrorString(int error, const char** text) { *text = error == 1 ? "invalid argument" : "another error"; return 0; }
