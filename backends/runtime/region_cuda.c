/* Runs a program compiled for an NVIDIA GPU: all launches as one CUDA graph, captured at the first run.
 *
 * Functions of the library, in TVM-FFI's calling convention, as in region.c:
 *   main(arena, inputs..., outputs...)              runs once; outputs are written in place
 *   profile(times, arena, inputs..., outputs...)    the same, and times[i] is the start of launch i in ns, times[launches] the end
 *   describe() -> str                               JSON: arena bytes (0), inputs and outputs, steps
 * `arena` is not read: intermediate buffers lie on the device, where the library holds one allocation for weights, arena and copies
 * of inputs and outputs. Tensors are dense, each on the CPU or on the device; the device is that of the first tensor there, else
 * device 0. Kernels read and write tensors of the device where they are, but for addresses that are no multiple of 16 and outputs
 * that overlap another tensor: those are copied, as are the CPU's.
 * Work is queued on the stream that TVM-FFI names for the device (torch's current one, by default the legacy stream). A run with
 * a CPU tensor returns when everything is done, one whose tensors are all on the device as soon as its work is queued.
 *
 * The driver is loaded when a program first runs, so the library needs neither CUDA's headers nor its libraries.
 */
#include "region_cuda.h"

#include "cuda_driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/extra/c_env_api.h>

#define GW_DEVICE_ALIGNMENT 256
/* The longest load or store of a kernel, bytes: of what the addresses of its arguments are multiples. */
#define GW_VECTOR 16
#define GW_MESSAGE 512

/* -- state: one program of one process on one device -- */

/* All launches, recorded. nodes: of each launch, which live as long as `recorded`. bound: where the kernels find each input and
 * output. */
typedef struct {
  CUgraph recorded;
  CUgraphExec executable;
  CUgraphNode* nodes;
  CUdeviceptr* bound;
} gw_graph;

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
  CUdeviceptr arena, *tensors; /* tensors: a copy of each input and output, for those that kernels cannot use where they are */
  gw_graph graph, timed_graph;
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

static CUdeviceptr address(const gw_graph* graph, const gw_place* place) {
  switch (place->space) {
    case GW_ARENA:
      return state.arena + place->offset;
    case GW_WEIGHTS:
      return state.memory + place->offset;
    case GW_INPUT:
      return graph->bound[place->offset];
    default:
      return graph->bound[gw_cuda_program.input_count + place->offset];
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

/* Calls `start` with the arguments of launch i. */
static CUresult with_arguments(const gw_graph* graph, uint32_t i, CUresult (*start)(const gw_graph*, uint32_t, void**, void*), void* data) {
  const gw_launch* launch = &gw_cuda_program.launches[i];
  CUdeviceptr pointers[launch->places + launch->hidden + 1];
  void* arguments[launch->places + launch->hidden + 1];
  memset(pointers, 0, sizeof(pointers));
  for (uint32_t p = 0; p < launch->places; ++p) pointers[p] = address(graph, &gw_cuda_program.places[launch->first_place + p]);
  for (uint32_t p = 0; p < launch->places + launch->hidden; ++p) arguments[p] = &pointers[p];
  return start(graph, i, arguments, data);
}

typedef struct {
  CUstream stream;
  int overlap;
} gw_recording;

/* Records launch i, and which node of the graph it becomes. */
static CUresult record(const gw_graph* graph, uint32_t i, void** arguments, void* data) {
  const gw_recording* recording = data;
  const CUgraphNode* last = NULL;
  CUgraph unused = NULL;
  int status = 0;
  uint64_t id = 0;
  size_t count = 0;
  CUresult result = start_kernel(&gw_cuda_program.launches[i], state.functions[i], recording->stream, arguments, recording->overlap);
  if (result == 0) result = cu.StreamGetCaptureInfo(recording->stream, &status, &id, &unused, &last, &count);
  if (result == 0) graph->nodes[i] = last[0];
  return result;
}

/* Gives the recorded launch i the addresses that its inputs and outputs are bound to by now. */
static CUresult rebind(const gw_graph* graph, uint32_t i, void** arguments, void* unused) {
  const gw_launch* launch = &gw_cuda_program.launches[i];
  const uint32_t *grid = launch->grid, *block = launch->block;
  const CUkernelNodeParams parameters = {
      state.functions[i], {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, launch->shared, arguments, NULL};
  (void)unused;
  return cu.GraphSetKernel(graph->executable, graph->nodes[i], &parameters);
}

static int launch_all(gw_graph* graph, CUstream stream, const CUevent* events) {
  for (uint32_t i = 0; i < gw_cuda_program.launch_count; ++i) {
    gw_recording recording = {stream, i > 0 && !events}; /* an event between two launches orders them as it did before */
    if (events && check(cu.EventRecordExternal(events[i], stream, kExternal), "cannot time launch %u", i)) return -1;
    if (check(with_arguments(graph, i, record, &recording), "launch %u, kernel '%s', fails", i, gw_cuda_program.launches[i].symbol)) {
      return -1;
    }
  }
  if (!events) return 0;
  return check(cu.EventRecordExternal(events[gw_cuda_program.launch_count], stream, kExternal), "cannot time the last launch");
}

/* Records all launches, bound to our copies. events: recorded before each launch and after the last, or NULL. */
static int capture(gw_graph* graph, const CUevent* events) {
  CUstream stream = NULL;
  graph->nodes = calloc(gw_cuda_program.launch_count, sizeof(*graph->nodes));
  graph->bound = calloc(tensor_count(), sizeof(*graph->bound));
  memcpy(graph->bound, state.tensors, tensor_count() * sizeof(*graph->bound));
  if (check(cu.StreamCreate(&stream, kNonBlocking), "cannot make a stream")) return -1;
  int status = check(cu.StreamBeginCapture(stream, kThreadLocal), "cannot record a graph");
  if (status == 0) {
    status = launch_all(graph, stream, events);
    const CUresult ended = cu.StreamEndCapture(stream, &graph->recorded);
    if (status == 0) status = check(ended, "cannot record a graph");
  }
  if (status == 0) status = check(cu.GraphInstantiate(&graph->executable, graph->recorded, 0),
                                  "cannot make a graph of %u launches executable", gw_cuda_program.launch_count);
  cu.StreamDestroy(stream);
  return status;
}

static void discard(gw_graph* graph) {
  if (graph->executable) cu.GraphExecDestroy(graph->executable);
  if (graph->recorded) cu.GraphDestroy(graph->recorded);
  free(graph->nodes), free(graph->bound);
  memset(graph, 0, sizeof(*graph));
}

static void release(void) {
  if (state.events) {
    for (uint32_t i = 0; i <= gw_cuda_program.launch_count; ++i) {
      if (state.events[i]) cu.EventDestroy(state.events[i]);
    }
  }
  discard(&state.timed_graph), discard(&state.graph);
  if (state.done) cu.EventDestroy(state.done);
  if (state.memory) cu.MemFree(state.memory);
  if (state.modules) {
    for (uint32_t i = 0; i < gw_cuda_program.image_count; ++i) {
      if (state.modules[i]) cu.ModuleUnload(state.modules[i]);
    }
  }
  free(state.events), free(state.modules), free(state.functions), free(state.tensors);
  state.events = NULL, state.modules = NULL, state.functions = NULL, state.tensors = NULL;
  state.done = NULL, state.memory = 0, state.stream = NULL, state.ready = 0;
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

/* Whether a kernel may write tensor `index` while others read and write theirs. */
static int apart(const gw_tensor* tensors, uint32_t index) {
  const uint8_t *first = tensors[index].data, *end = first + gw_cuda_program.sizes[index];
  for (uint32_t i = 0; i < tensor_count(); ++i) {
    const uint8_t* other = tensors[i].data;
    if (i != index && tensors[i].on_device && other < end && first < other + gw_cuda_program.sizes[i]) return 0;
  }
  return 1;
}

/* Where kernels find tensor `index` in a run: where it is, or in our copy of it. */
static CUdeviceptr place_of(const gw_tensor* tensors, uint32_t index) {
  const CUdeviceptr there = (CUdeviceptr)(uintptr_t)tensors[index].data;
  const int output = index >= gw_cuda_program.input_count;
  const int usable = tensors[index].on_device && there % GW_VECTOR == 0 && (!output || apart(tensors, index));
  return usable ? there : state.tensors[index];
}

static int uses(const gw_launch* launch, const uint8_t* tensors) {
  for (uint32_t p = 0; p < launch->places; ++p) {
    const gw_place* place = &gw_cuda_program.places[launch->first_place + p];
    if (place->space == GW_INPUT && tensors[place->offset]) return 1;
    if (place->space == GW_OUTPUT && tensors[gw_cuda_program.input_count + place->offset]) return 1;
  }
  return 0;
}

/* Binds the graph's launches to where inputs and outputs of a run are. Most callers keep theirs in one place, so that nothing is
 * left to do. */
static int bind(gw_graph* graph, const gw_tensor* tensors) {
  uint8_t moved[tensor_count() + 1];
  int any = 0;
  for (uint32_t i = 0; i < tensor_count(); ++i) {
    const CUdeviceptr place = place_of(tensors, i);
    moved[i] = place != graph->bound[i];
    any = any || moved[i];
    graph->bound[i] = place;
  }
  for (uint32_t i = 0; any && i < gw_cuda_program.launch_count; ++i) {
    const gw_launch* launch = &gw_cuda_program.launches[i];
    if (!uses(launch, moved)) continue;
    const CUresult result = with_arguments(graph, i, rebind, NULL);
    if (result == 0) continue;
    memset(graph->bound, 0, tensor_count() * sizeof(*graph->bound)); /* the next run binds all of them */
    return check(result, "launch %u, kernel '%s', cannot be given other tensors", i, launch->symbol);
  }
  return 0;
}

/* Queues one run. The arena is that of the run before, so it waits for that: a stream made by the caller may be gone since, and
 * its handle name another. The legacy stream (NULL) is always the same one: there a run needs no wait for the run before, and its
 * end is marked only when another stream asks. */
static int queue(const gw_tensor* tensors, gw_graph* graph, CUstream stream) {
  if (bind(graph, tensors)) return -1;
  if (stream && !state.stream && check(cu.EventRecord(state.done, NULL), "cannot mark the end of the run before")) return -1;
  if ((stream || state.stream) && check(cu.StreamWaitEvent(stream, state.done, 0), "cannot wait for the run before")) return -1;
  state.stream = stream;
  for (uint32_t i = 0; i < gw_cuda_program.input_count; ++i) {
    if (graph->bound[i] == state.tensors[i] && copy(&tensors[i], i, 0, stream)) return -1;
  }
  if (check(cu.GraphLaunch(graph->executable, stream), "cannot launch the program's graph")) return -1;
  for (uint32_t i = gw_cuda_program.input_count; i < tensor_count(); ++i) {
    if (graph->bound[i] == state.tensors[i] && copy(&tensors[i], i, 1, stream)) return -1;
  }
  return stream ? check(cu.EventRecord(state.done, stream), "cannot mark the end of a run") : 0;
}

static int prepare_timing(void) {
  if (state.timed_graph.executable) return 0;
  discard(&state.timed_graph); /* of an attempt that failed */
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
  if (queue(tensors, times ? &state.timed_graph : &state.graph, stream)) return -1;
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
