/* Runs a program compiled for an NVIDIA GPU: all launches as one CUDA graph, captured at the first run.
 *
 * Functions of the library, in TVM-FFI's calling convention, as in region.c:
 *   main(arena, inputs..., outputs...)              runs once; outputs are written in place
 *   profile(times, arena, inputs..., outputs...)    the same, and times[i] is the start of launch i in ns, times[launches] the end
 *   describe() -> str                               JSON: arena bytes (0), inputs and outputs, steps
 * `arena` is not read: intermediate buffers lie on the device, where the library holds one allocation for weights, arena, inputs
 * and outputs. Tensors are dense, each on the CPU or on the device; the device is that of the first tensor there, else device 0.
 * Work is queued on the stream that TVM-FFI names for the device (torch's current one, by default the legacy stream). A run with
 * a CPU tensor returns when everything is done, one whose tensors are all on the device as soon as its work is queued.
 *
 * The driver is loaded when a program first runs, so the library needs neither CUDA's headers nor its libraries.
 */
#include "region_cuda.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/extra/c_env_api.h>

#define GW_DEVICE_ALIGNMENT 256
#define GW_MESSAGE 512

/* -- the driver's interface: what of cuda.h this file uses, in the versions that CUDA 11.4 and later export -- */

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef struct CUctx_st* CUcontext;
typedef struct CUmod_st* CUmodule;
typedef struct CUfunc_st* CUfunction;
typedef struct CUstream_st* CUstream;
typedef struct CUevent_st* CUevent;
typedef struct CUgraph_st* CUgraph;
typedef struct CUgraphExec_st* CUgraphExec;

/* A kernel that may start before the one before it on the stream ends; it waits for that itself. */
typedef struct {
  int id; /* CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION */
  int unused;
  union {
    int allowed;
    char bytes[64];
  } value;
} CUlaunchAttribute;

typedef struct {
  unsigned grid[3], block[3], shared;
  CUstream stream;
  const CUlaunchAttribute* attributes;
  unsigned attribute_count;
} CUlaunchConfig;

enum {
  kSerialization = 6,       /* CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION */
  kOverlapVersion = 12030,  /* the first driver that records such launches in a graph */
  kMajor = 75,              /* CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR */
  kMinor = 76,              /* CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR */
  kDynamicShared = 8,       /* CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES */
  kNonBlocking = 1,         /* CU_STREAM_NON_BLOCKING */
  kThreadLocal = 1,         /* CU_STREAM_CAPTURE_MODE_THREAD_LOCAL */
  kExternal = 1,            /* CU_EVENT_RECORD_EXTERNAL */
  kUntimed = 2,             /* CU_EVENT_DISABLE_TIMING */
  kOutOfMemory = 2,         /* CUDA_ERROR_OUT_OF_MEMORY */
  kDefaultSharedBytes = 48 * 1024
};

#define GW_DRIVER(X)                                                                                            \
  X(Init, "cuInit", (unsigned))                                                                                 \
  X(DriverVersion, "cuDriverGetVersion", (int*))                                                                \
  X(DeviceGetCount, "cuDeviceGetCount", (int*))                                                                 \
  X(DeviceGet, "cuDeviceGet", (CUdevice*, int))                                                                 \
  X(DeviceGetName, "cuDeviceGetName", (char*, int, CUdevice))                                                   \
  X(DeviceGetAttribute, "cuDeviceGetAttribute", (int*, int, CUdevice))                                          \
  X(PrimaryRetain, "cuDevicePrimaryCtxRetain", (CUcontext*, CUdevice))                                          \
  X(PrimaryRelease, "cuDevicePrimaryCtxRelease_v2", (CUdevice))                                                 \
  X(CtxPush, "cuCtxPushCurrent_v2", (CUcontext))                                                                \
  X(CtxPop, "cuCtxPopCurrent_v2", (CUcontext*))                                                                 \
  X(MemGetInfo, "cuMemGetInfo_v2", (size_t*, size_t*))                                                          \
  X(MemAlloc, "cuMemAlloc_v2", (CUdeviceptr*, size_t))                                                          \
  X(MemFree, "cuMemFree_v2", (CUdeviceptr))                                                                     \
  X(CopyToDevice, "cuMemcpyHtoDAsync_v2", (CUdeviceptr, const void*, size_t, CUstream))                         \
  X(CopyToHost, "cuMemcpyDtoHAsync_v2", (void*, CUdeviceptr, size_t, CUstream))                                 \
  X(CopyOnDevice, "cuMemcpyDtoDAsync_v2", (CUdeviceptr, CUdeviceptr, size_t, CUstream))                         \
  X(ModuleLoad, "cuModuleLoadData", (CUmodule*, const void*))                                                   \
  X(ModuleUnload, "cuModuleUnload", (CUmodule))                                                                 \
  X(ModuleGetFunction, "cuModuleGetFunction", (CUfunction*, CUmodule, const char*))                             \
  X(FuncSetAttribute, "cuFuncSetAttribute", (CUfunction, int, int))                                             \
  X(Launch, "cuLaunchKernel",                                                                                   \
    (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**)) \
  X(StreamCreate, "cuStreamCreate", (CUstream*, unsigned))                                                      \
  X(StreamDestroy, "cuStreamDestroy_v2", (CUstream))                                                            \
  X(StreamSynchronize, "cuStreamSynchronize", (CUstream))                                                       \
  X(StreamWaitEvent, "cuStreamWaitEvent", (CUstream, CUevent, unsigned))                                        \
  X(StreamBeginCapture, "cuStreamBeginCapture_v2", (CUstream, int))                                             \
  X(StreamEndCapture, "cuStreamEndCapture", (CUstream, CUgraph*))                                               \
  X(GraphInstantiate, "cuGraphInstantiateWithFlags", (CUgraphExec*, CUgraph, unsigned long long))               \
  X(GraphLaunch, "cuGraphLaunch", (CUgraphExec, CUstream))                                                      \
  X(GraphDestroy, "cuGraphDestroy", (CUgraph))                                                                  \
  X(GraphExecDestroy, "cuGraphExecDestroy", (CUgraphExec))                                                      \
  X(EventCreate, "cuEventCreate", (CUevent*, unsigned))                                                         \
  X(EventDestroy, "cuEventDestroy_v2", (CUevent))                                                               \
  X(EventRecord, "cuEventRecord", (CUevent, CUstream))                                                          \
  X(EventRecordExternal, "cuEventRecordWithFlags", (CUevent, CUstream, unsigned))                               \
  X(EventElapsed, "cuEventElapsedTime", (float*, CUevent, CUevent))                                             \
  X(GetErrorName, "cuGetErrorName", (CUresult, const char**))                                                   \
  X(GetErrorString, "cuGetErrorString", (CUresult, const char**))

static struct {
#define GW_FIELD(name, symbol, parameters) CUresult(*name) parameters;
  GW_DRIVER(GW_FIELD)
#undef GW_FIELD
  CUresult (*LaunchOverlapped)(const CUlaunchConfig*, CUfunction, void**, void**); /* NULL where the driver cannot record it */
} cu;

/* -- state: one program of one process on one device -- */

static struct {
  pthread_mutex_t lock;
  void* driver;
  int ready, ordinal; /* ready: everything below stands */
  CUdevice device;
  char name[100];
  CUcontext context;
  CUmodule* modules;
  CUfunction* functions; /* of each launch */
  CUdeviceptr memory;    /* weights, arena, inputs, outputs */
  CUdeviceptr arena, *tensors;
  CUgraphExec graph, timed_graph;
  CUevent* events;    /* of the timed graph: the start of each launch, and the end */
  CUevent done;       /* of the latest run, where that was not on the legacy stream */
  CUstream stream;    /* of the latest run */
} state = {.lock = PTHREAD_MUTEX_INITIALIZER};

static int refuse(const char* kind, const char* format, ...) {
  char message[GW_MESSAGE];
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof(message), format, values);
  va_end(values);
  TVMFFIErrorSetRaisedFromCStr(kind, message);
  return -1;
}

/* 0 for success, else an error that says what failed and the driver's words for it. */
static int check(CUresult result, const char* format, ...) {
  if (result == 0) return 0;
  char what[GW_MESSAGE / 2];
  const char *name = NULL, *text = NULL;
  va_list values;
  va_start(values, format);
  vsnprintf(what, sizeof(what), format, values);
  va_end(values);
  if (cu.GetErrorName) cu.GetErrorName(result, &name);
  if (cu.GetErrorString) cu.GetErrorString(result, &text);
  return refuse("RuntimeError", "%s: %s (%s, CUDA error %d)", what, text ? text : "no explanation", name ? name : "unknown", result);
}

static uint64_t aligned(uint64_t size) { return (size + GW_DEVICE_ALIGNMENT - 1) / GW_DEVICE_ALIGNMENT * GW_DEVICE_ALIGNMENT; }

static uint32_t tensor_count(void) { return gw_cuda_program.input_count + gw_cuda_program.output_count; }

/* -- set-up -- */

static int load_driver(void) {
  if (state.driver) return 0;
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!driver) {
    return refuse("RuntimeError",
                  "this program is for an NVIDIA GPU (sm_%u), and this machine has no NVIDIA driver: libcuda.so.1 does not load (%s)",
                  gw_cuda_program.capability, dlerror());
  }
#define GW_LOAD(name, symbol, parameters)                                                                                   \
  *(void**)&cu.name = dlsym(driver, symbol);                                                                                \
  if (!cu.name) {                                                                                                           \
    dlclose(driver);                                                                                                        \
    return refuse("RuntimeError", "this NVIDIA driver is too old: it has no %s; install one for CUDA 11.4 or later", symbol); \
  }
  GW_DRIVER(GW_LOAD)
#undef GW_LOAD
  int version = 0;
  if (gw_cuda_program.overlap && cu.DriverVersion(&version) == 0 && version >= kOverlapVersion) {
    *(void**)&cu.LaunchOverlapped = dlsym(driver, "cuLaunchKernelEx");
  }
  if (check(cu.Init(0), "the NVIDIA driver does not start")) {
    dlclose(driver);
    return -1;
  }
  state.driver = driver;
  return 0;
}

/* A cubin runs on chips of its major compute capability and the same or a higher minor one. */
static int open_device(int ordinal) {
  int count = 0, major = 0, minor = 0;
  const int wanted = (int)gw_cuda_program.capability;
  if (check(cu.DeviceGetCount(&count), "cannot count the devices")) return -1;
  if (count <= ordinal) {
    return refuse("RuntimeError", "this program is for an NVIDIA GPU (sm_%d); device %d is wanted and %d are visible", wanted, ordinal,
                  count);
  }
  if (check(cu.DeviceGet(&state.device, ordinal), "cannot open device %d", ordinal)) return -1;
  if (check(cu.DeviceGetName(state.name, sizeof(state.name), state.device), "cannot name device %d", ordinal)) return -1;
  if (check(cu.DeviceGetAttribute(&major, kMajor, state.device), "cannot ask device %d for its compute capability", ordinal) ||
      check(cu.DeviceGetAttribute(&minor, kMinor, state.device), "cannot ask device %d for its compute capability", ordinal)) {
    return -1;
  }
  if (major != wanted / 10 || minor < wanted % 10) {
    return refuse("RuntimeError", "this program is for sm_%d, and device %d (%s) is sm_%d%d: build it for target cuda:sm_%d%d", wanted,
                  ordinal, state.name, major, minor, major, minor);
  }
  state.ordinal = ordinal;
  return check(cu.PrimaryRetain(&state.context, state.device), "cannot make a context on device %d (%s)", ordinal, state.name);
}

static int load_functions(void) {
  state.modules = calloc(gw_cuda_program.image_count, sizeof(*state.modules));
  state.functions = calloc(gw_cuda_program.launch_count, sizeof(*state.functions));
  for (uint32_t i = 0; i < gw_cuda_program.image_count; ++i) {
    if (check(cu.ModuleLoad(&state.modules[i], gw_cuda_program.images[i]), "cannot load image %u of %u onto device %d (%s)", i,
              gw_cuda_program.image_count, state.ordinal, state.name)) {
      return -1;
    }
  }
  for (uint32_t i = 0; i < gw_cuda_program.launch_count; ++i) {
    const gw_launch* launch = &gw_cuda_program.launches[i];
    if (check(cu.ModuleGetFunction(&state.functions[i], state.modules[launch->image], launch->symbol), "launch %u: no kernel '%s'", i,
              launch->symbol)) {
      return -1;
    }
    if (launch->shared > kDefaultSharedBytes &&
        check(cu.FuncSetAttribute(state.functions[i], kDynamicShared, (int)launch->shared),
              "kernel '%s' cannot have %u bytes of shared memory", launch->symbol, launch->shared)) {
      return -1;
    }
  }
  return 0;
}

/* One allocation: weights, arena, and a copy of every input and output at an address that the graph can hold. */
static int allocate(void) {
  uint64_t bytes = aligned(gw_cuda_program.weight_bytes) + aligned(gw_cuda_program.arena_bytes);
  for (uint32_t i = 0; i < tensor_count(); ++i) bytes += aligned(gw_cuda_program.sizes[i]);
  const CUresult result = cu.MemAlloc(&state.memory, bytes);
  if (result == kOutOfMemory) {
    size_t unused = 0, total = 0;
    cu.MemGetInfo(&unused, &total);
    return refuse("MemoryError", "this program needs %llu bytes of device memory (%llu of them weights); device %d (%s) has %llu of %llu free",
                  (unsigned long long)bytes, (unsigned long long)gw_cuda_program.weight_bytes, state.ordinal, state.name,
                  (unsigned long long)unused, (unsigned long long)total);
  }
  if (check(result, "cannot allocate %llu bytes on device %d (%s)", (unsigned long long)bytes, state.ordinal, state.name)) return -1;
  state.arena = state.memory + aligned(gw_cuda_program.weight_bytes);
  state.tensors = calloc(tensor_count(), sizeof(*state.tensors));
  CUdeviceptr next = state.arena + aligned(gw_cuda_program.arena_bytes);
  for (uint32_t i = 0; i < tensor_count(); ++i) {
    state.tensors[i] = next;
    next += aligned(gw_cuda_program.sizes[i]);
  }
  return 0;
}

static CUdeviceptr address(const gw_place* place) {
  switch (place->space) {
    case GW_ARENA:
      return state.arena + place->offset;
    case GW_WEIGHTS:
      return state.memory + place->offset;
    case GW_INPUT:
      return state.tensors[place->offset];
    default:
      return state.tensors[gw_cuda_program.input_count + place->offset];
  }
}

static CUresult start_kernel(const gw_launch* launch, CUfunction function, CUstream stream, void** arguments, int overlap) {
  const uint32_t *grid = launch->grid, *block = launch->block;
  if (!overlap || !cu.LaunchOverlapped) {
    return cu.Launch(function, grid[0], grid[1], grid[2], block[0], block[1], block[2], launch->shared, stream, arguments, NULL);
  }
  const CUlaunchAttribute early = {.id = kSerialization, .value = {.allowed = 1}};
  const CUlaunchConfig config = {{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, launch->shared, stream, &early, 1};
  return cu.LaunchOverlapped(&config, function, arguments, NULL);
}

static int launch_all(CUstream stream, const CUevent* events) {
  for (uint32_t i = 0; i < gw_cuda_program.launch_count; ++i) {
    const gw_launch* launch = &gw_cuda_program.launches[i];
    CUdeviceptr pointers[launch->places + launch->hidden + 1];
    void* arguments[launch->places + launch->hidden + 1];
    memset(pointers, 0, sizeof(pointers));
    for (uint32_t p = 0; p < launch->places; ++p) pointers[p] = address(&gw_cuda_program.places[launch->first_place + p]);
    for (uint32_t p = 0; p < launch->places + launch->hidden; ++p) arguments[p] = &pointers[p];
    if (events && check(cu.EventRecordExternal(events[i], stream, kExternal), "cannot time launch %u", i)) return -1;
    /* An event between two launches orders them as it did before. */
    if (check(start_kernel(launch, state.functions[i], stream, arguments, i > 0 && !events), "launch %u, kernel '%s', fails", i,
              launch->symbol)) {
      return -1;
    }
  }
  if (!events) return 0;
  return check(cu.EventRecordExternal(events[gw_cuda_program.launch_count], stream, kExternal), "cannot time the last launch");
}

/* Records all launches as a graph. events: recorded before each launch and after the last, or NULL. */
static int capture(CUgraphExec* graph, const CUevent* events) {
  CUstream stream = NULL;
  CUgraph recorded = NULL;
  if (check(cu.StreamCreate(&stream, kNonBlocking), "cannot make a stream")) return -1;
  int status = check(cu.StreamBeginCapture(stream, kThreadLocal), "cannot record a graph");
  if (status == 0) {
    status = launch_all(stream, events);
    const CUresult ended = cu.StreamEndCapture(stream, &recorded);
    if (status == 0) status = check(ended, "cannot record a graph");
  }
  if (status == 0) status = check(cu.GraphInstantiate(graph, recorded, 0), "cannot make a graph of %u launches executable",
                                  gw_cuda_program.launch_count);
  if (recorded) cu.GraphDestroy(recorded);
  cu.StreamDestroy(stream);
  return status;
}

static void release(void) {
  if (state.events) {
    for (uint32_t i = 0; i <= gw_cuda_program.launch_count; ++i) {
      if (state.events[i]) cu.EventDestroy(state.events[i]);
    }
  }
  if (state.timed_graph) cu.GraphExecDestroy(state.timed_graph);
  if (state.graph) cu.GraphExecDestroy(state.graph);
  if (state.done) cu.EventDestroy(state.done);
  if (state.memory) cu.MemFree(state.memory);
  if (state.modules) {
    for (uint32_t i = 0; i < gw_cuda_program.image_count; ++i) {
      if (state.modules[i]) cu.ModuleUnload(state.modules[i]);
    }
  }
  free(state.events), free(state.modules), free(state.functions), free(state.tensors);
  state.events = NULL, state.modules = NULL, state.functions = NULL, state.tensors = NULL;
  state.timed_graph = state.graph = NULL, state.done = NULL, state.memory = 0, state.stream = NULL, state.ready = 0;
}

/* Prepares everything that runs share. Where it returns 0, the device's context is current. */
static int prepare(int ordinal) {
  if (state.ready) {
    if (ordinal >= 0 && ordinal != state.ordinal) {
      return refuse("ValueError", "this program runs on device %d already, and a tensor is on device %d; load it once more for that",
                    state.ordinal, ordinal);
    }
    return check(cu.CtxPush(state.context), "cannot use device %d (%s)", state.ordinal, state.name);
  }
  if (load_driver() || open_device(ordinal < 0 ? 0 : ordinal)) return -1;
  if (check(cu.CtxPush(state.context), "cannot use device %d (%s)", state.ordinal, state.name)) {
    cu.PrimaryRelease(state.device);
    return -1;
  }
  const uint64_t bytes = gw_cuda_program.weight_bytes;
  if (load_functions() || allocate() ||
      check(cu.CopyToDevice(state.memory, gw_cuda_program.weights, bytes, NULL), "cannot upload the weights") ||
      check(cu.StreamSynchronize(NULL), "cannot upload the weights") || capture(&state.graph, NULL) ||
      check(cu.EventCreate(&state.done, kUntimed), "cannot make an event")) {
    CUcontext current;
    release();
    cu.CtxPop(&current);
    cu.PrimaryRelease(state.device);
    return -1;
  }
  state.ready = 1;
  return 0;
}

__attribute__((destructor)) static void unload(void) {
  CUcontext current;
  if (!state.ready || cu.CtxPush(state.context) != 0) return; /* at the end of a process the driver may be gone before us */
  release();
  cu.CtxPop(&current);
  cu.PrimaryRelease(state.device);
}

/* -- runs -- */

typedef struct {
  void* data;
  int on_device;
} gw_tensor;

/* Fills in where a tensor lies. ordinal: the device that tensors are on so far (-1: none). */
static int find(const TVMFFIAny* argument, const char* role, uint32_t index, uint64_t bytes, int* ordinal, gw_tensor* found) {
  const DLTensor* tensor = NULL;
  if (argument->type_index == kTVMFFIDLTensorPtr) {
    tensor = argument->v_ptr;
  } else if (argument->type_index == kTVMFFITensor) {
    tensor = (const DLTensor*)(argument->v_obj + 1); /* it follows the object's header */
  }
  if (!tensor) return refuse("TypeError", "%s %u is no tensor", role, index);
  const int kind = tensor->device.device_type;
  found->on_device = kind == kDLCUDA;
  if (!found->on_device && kind != kDLCPU && kind != kDLCUDAHost) {
    return refuse("TypeError", "%s %u is on a device of kind %d; this program takes CPU and CUDA tensors", role, index, kind);
  }
  if (found->on_device) {
    if (*ordinal >= 0 && *ordinal != tensor->device.device_id) {
      return refuse("ValueError", "%s %u is on device %d, and another tensor on device %d", role, index, tensor->device.device_id, *ordinal);
    }
    *ordinal = tensor->device.device_id;
  }
  uint64_t size = (uint64_t)(tensor->dtype.bits * tensor->dtype.lanes + 7) / 8;
  int64_t step = 1;
  for (int32_t axis = tensor->ndim - 1; axis >= 0; --axis) {
    if (tensor->strides && tensor->shape[axis] > 1 && tensor->strides[axis] != step) {
      return refuse("ValueError", "%s %u is strided; this program takes dense tensors", role, index);
    }
    step *= tensor->shape[axis];
  }
  size *= (uint64_t)step;
  if (size != bytes) {
    return refuse("ValueError", "%s %u has %llu bytes; this program needs %llu", role, index, (unsigned long long)size,
                  (unsigned long long)bytes);
  }
  found->data = (uint8_t*)tensor->data + tensor->byte_offset;
  return 0;
}

static int copy(const gw_tensor* tensor, uint32_t index, int out, CUstream stream) {
  const uint64_t bytes = gw_cuda_program.sizes[index];
  const CUdeviceptr here = state.tensors[index], there = (CUdeviceptr)(uintptr_t)tensor->data;
  if (bytes == 0) return 0;
  if (out) {
    return check(tensor->on_device ? cu.CopyOnDevice(there, here, bytes, stream) : cu.CopyToHost(tensor->data, here, bytes, stream),
                 "cannot copy an output of %llu bytes", (unsigned long long)bytes);
  }
  return check(tensor->on_device ? cu.CopyOnDevice(here, there, bytes, stream) : cu.CopyToDevice(here, tensor->data, bytes, stream),
               "cannot copy an input of %llu bytes", (unsigned long long)bytes);
}

/* Queues one run. The buffers are those of the run before, so it waits for that: a stream made by the caller may be gone since, and
 * its handle name another. The legacy stream (NULL) is always the same one: there a run needs no wait for the run before, and its
 * end is marked only when another stream asks. */
static int queue(const gw_tensor* tensors, CUgraphExec graph, CUstream stream) {
  if (stream && !state.stream && check(cu.EventRecord(state.done, NULL), "cannot mark the end of the run before")) return -1;
  if ((stream || state.stream) && check(cu.StreamWaitEvent(stream, state.done, 0), "cannot wait for the run before")) return -1;
  state.stream = stream;
  for (uint32_t i = 0; i < gw_cuda_program.input_count; ++i) {
    if (copy(&tensors[i], i, 0, stream)) return -1;
  }
  if (check(cu.GraphLaunch(graph, stream), "cannot launch the program's graph")) return -1;
  for (uint32_t i = gw_cuda_program.input_count; i < tensor_count(); ++i) {
    if (copy(&tensors[i], i, 1, stream)) return -1;
  }
  return stream ? check(cu.EventRecord(state.done, stream), "cannot mark the end of a run") : 0;
}

static int prepare_timing(void) {
  if (state.timed_graph) return 0;
  if (!state.events) state.events = calloc(gw_cuda_program.launch_count + 1, sizeof(*state.events));
  for (uint32_t i = 0; i <= gw_cuda_program.launch_count; ++i) {
    if (!state.events[i] && check(cu.EventCreate(&state.events[i], 0), "cannot make an event")) return -1;
  }
  return capture(&state.timed_graph, state.events);
}

static int read_times(int64_t* times) {
  for (uint32_t i = 0; i <= gw_cuda_program.launch_count; ++i) {
    float milliseconds = 0;
    if (check(cu.EventElapsed(&milliseconds, state.events[0], state.events[i]), "cannot read the time of launch %u", i)) return -1;
    times[i] = (int64_t)((double)milliseconds * 1e6);
  }
  return 0;
}

static int run(const gw_tensor* tensors, int wait, int64_t* times) {
  CUstream stream = TVMFFIEnvGetStream(kDLCUDA, state.ordinal);
  if (times && prepare_timing()) return -1;
  if (queue(tensors, times ? state.timed_graph : state.graph, stream)) return -1;
  if ((wait || times) && check(cu.StreamSynchronize(stream), "the program fails on device %d (%s)", state.ordinal, state.name)) return -1;
  return times ? read_times(times) : 0;
}

static int start(const TVMFFIAny* arguments, int32_t count, int64_t* times) {
  if (count != (int32_t)tensor_count() + 1) return refuse("TypeError", "this program takes an arena, its inputs and its outputs");
  gw_tensor tensors[tensor_count() + 1];
  int ordinal = -1, wait = 0;
  for (uint32_t i = 0; i < tensor_count(); ++i) {
    const int output = i >= gw_cuda_program.input_count;
    const uint32_t position = output ? i - gw_cuda_program.input_count : i;
    if (find(&arguments[i + 1], output ? "output" : "input", position, gw_cuda_program.sizes[i], &ordinal, &tensors[i])) return -1;
    wait = wait || !tensors[i].on_device;
  }
  pthread_mutex_lock(&state.lock);
  int status = prepare(ordinal);
  if (status == 0) {
    CUcontext current;
    status = run(tensors, wait, times);
    cu.CtxPop(&current);
  }
  pthread_mutex_unlock(&state.lock);
  return status;
}

int __tvm_ffi_main(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  (void)self, (void)result;
  return start(arguments, count, NULL);
}

int __tvm_ffi_profile(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  (void)self, (void)result;
  gw_tensor times;
  int ordinal = -1;
  if (count < 1) return refuse("TypeError", "profile takes a tensor of int64 times first");
  if (find(&arguments[0], "times", 0, ((uint64_t)gw_cuda_program.launch_count + 1) * sizeof(int64_t), &ordinal, &times)) return -1;
  if (times.on_device) return refuse("TypeError", "the times of a profile lie on the CPU");
  return start(arguments + 1, count - 1, times.data);
}

int __tvm_ffi_describe(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  (void)self, (void)arguments, (void)count;
  const TVMFFIByteArray text = {gw_cuda_program.description, strlen(gw_cuda_program.description)};
  return TVMFFIStringFromByteArray(&text, result);
}
