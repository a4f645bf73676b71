/* What of NVIDIA's cuda.h `region_cuda.c` uses, in the versions that CUDA 11.4 and later export, so that neither building nor loading
 * a program needs CUDA's headers or libraries. */
#ifndef GRAPHWRIGHT_CUDA_DRIVER_H_
#define GRAPHWRIGHT_CUDA_DRIVER_H_

#include <stddef.h>
#include <stdint.h>

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
typedef struct CUgraphNode_st* CUgraphNode;

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

/* A launch recorded in a graph: CUDA_KERNEL_NODE_PARAMS_v1. */
typedef struct {
  CUfunction function;
  unsigned grid[3], block[3], shared;
  void **arguments, **extra;
} CUkernelNodeParams;

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
  X(StreamGetCaptureInfo, "cuStreamGetCaptureInfo_v2", (CUstream, int*, uint64_t*, CUgraph*, const CUgraphNode**, size_t*)) \
  X(GraphInstantiate, "cuGraphInstantiateWithFlags", (CUgraphExec*, CUgraph, unsigned long long))               \
  X(GraphLaunch, "cuGraphLaunch", (CUgraphExec, CUstream))                                                      \
  X(GraphSetKernel, "cuGraphExecKernelNodeSetParams", (CUgraphExec, CUgraphNode, const CUkernelNodeParams*))    \
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

#endif
