/* A CUDA device that is not there: answers what torch asks of NVIDIA's libraries before a kernel would run.

Built as one library by card.py, preloaded, and found under the driver's names besides: libcuda.so.1, libnvidia-ml.so.1.
One device, whose compute capability FAKE_CARD_CAPABILITY names (90 is 9.0). Nothing is allocated and nothing launched:
torch is only handed tensors without values.

The struct of a device's properties comes from the header that triton ships with its compiler. */

#include <driver_types.h>
#include <stdlib.h>
#include <string.h>

/* The runtime. Each returns cudaSuccess, which is 0. */

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDeviceCanAccessPeer(int *can, int one, int other) { *can = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -1;
    return 0;
}
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = (void *)16; return 0; }
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)32; return 0; }
const char *cudaGetErrorString(int error) { return "an answer of the pretended card"; }
const char *cudaGetErrorName(int error) { return "pretended"; }

#define MEMORY (80ul << 30)
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = MEMORY; return 0; }

static int capability(void) {
    const char *named = getenv("FAKE_CARD_CAPABILITY");
    return named ? atoi(named) : 90;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor   ? capability() / 10
             : attribute == cudaDevAttrComputeCapabilityMinor ? capability() % 10
                                                              : 1;
    return 0;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *card, int device) {
    memset(card, 0, sizeof *card);
    strcpy(card->name, "pretended card");
    card->major = capability() / 10;
    card->minor = capability() % 10;
    card->totalGlobalMem = MEMORY;
    card->multiProcessorCount = 132;
    card->warpSize = 32;
    card->maxThreadsPerBlock = 1024;
    card->maxThreadsPerMultiProcessor = 2048;
    card->sharedMemPerBlock = 48 << 10;
    card->sharedMemPerBlockOptin = 227 << 10;
    card->regsPerBlock = 1 << 16;
    card->maxGridSize[0] = 2147483647;
    card->maxGridSize[1] = card->maxGridSize[2] = 65535;
    card->maxThreadsDim[0] = 1024;
    return 0;
}
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *card, int device) { return cudaGetDeviceProperties(card, device); }

#define DOES_NOTHING(name) int name(void) { return 0; }
DOES_NOTHING(cudaSetDevice)
DOES_NOTHING(cudaInitDevice)
DOES_NOTHING(cudaFree)
DOES_NOTHING(cudaGetLastError)
DOES_NOTHING(cudaPeekAtLastError)
DOES_NOTHING(cudaThreadExchangeStreamCaptureMode)
DOES_NOTHING(cudaStreamQuery)
DOES_NOTHING(cudaStreamWaitEvent)
DOES_NOTHING(cudaEventRecord)
DOES_NOTHING(cudaEventRecordWithFlags)
DOES_NOTHING(cudaEventDestroy)
DOES_NOTHING(cudaDeviceSynchronize)
DOES_NOTHING(cudaStreamSynchronize)

/* The driver: asked whether the device has a context, when gradients are made. */

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)48; return 0; }
