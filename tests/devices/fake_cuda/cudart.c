/* A libcudart for tests: memory of the host, events that read a clock, graphs that remember one call.
 *
 * Work is what a test "queues" by calling fake_work(): it takes WORK_NS. A graph captured around it repeats it. Every
 * handle is checked, so a truncated pointer or a swapped argument is an error and not a silent success.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define OK 0
#define INVALID 1
#define NO_MEMORY 2
#define NOT_READY 600
#define WORK_NS 200000
#define LARGEST ((size_t)1 << 30)

typedef struct { uint32_t magic; int capturing, works; } Stream;
typedef struct { uint32_t magic; int64_t ns; int recorded, asked; } Event;
typedef struct { uint32_t magic; int works; } Graph;
enum { STREAM = 0x57EA, EVENT = 0xE7E, GRAPH = 0x64A, EXEC = 0xE8C };

static int live = 0, launches = 0, works_done = 0, fail_capture = 0;
static Stream *capturing_stream = 0;

static int64_t now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000LL + t.tv_nsec; }
static void busy(int64_t ns) { int64_t until = now() + ns; while (now() < until) {} }

int fake_live(void) { return live; }
int fake_launches(void) { return launches; }
int fake_works(void) { return works_done; }
void fake_fail_capture(int value) { fail_capture = value; }

/* What an inference does: queued in a graph while its stream is captured, else done at once. */
int fake_work(void *stream) {
    Stream *s = stream;
    if (!s || s->magic != STREAM) return 0;
    if (s->capturing) { s->works++; return 1; }
    works_done++;
    busy(WORK_NS);
    return 1;
}

const char *cudaGetErrorString(int code) { return code == NO_MEMORY ? "out of memory" : code == INVALID ? "invalid argument" : "other"; }
int cudaGetLastError(void) { return OK; }
int cudaRuntimeGetVersion(int *v) { *v = VERSION; return OK; }
int cudaSetDevice(int d) { return d == 0 ? OK : INVALID; }
int cudaDeviceGetAttribute(int *v, int attribute, int d) {
    if (d != 0) return INVALID;
    if (attribute == 75) *v = 8; else if (attribute == 76) *v = 7; else return INVALID;
    return OK;
}
int cudaMalloc(void **p, size_t n) { if (n > LARGEST) return NO_MEMORY; *p = malloc(n); live++; return OK; }
int cudaFree(void *p) { free(p); live--; return OK; }
int cudaHostAlloc(void **p, size_t n, unsigned flags) { if (flags) return INVALID; *p = calloc(1, n); live++; return OK; }
int cudaFreeHost(void *p) { free(p); live--; return OK; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) {
    Stream *s = stream;
    if (!s || s->magic != STREAM || (kind != 1 && kind != 2)) return INVALID;
    memcpy(to, from, n);
    return OK;
}
int cudaStreamCreateWithFlags(void **p, unsigned flags) {
    if (flags != 1) return INVALID;
    Stream *s = calloc(1, sizeof *s); s->magic = STREAM; *p = s; live++; return OK;
}
int cudaStreamDestroy(void *p) { Stream *s = p; if (s->magic != STREAM) return INVALID; free(s); live--; return OK; }
int cudaStreamSynchronize(void *p) { Stream *s = p; return s && s->magic == STREAM && !s->capturing ? OK : INVALID; }
int cudaEventCreateWithFlags(void **p, unsigned flags) {
    if (flags) return INVALID;
    Event *e = calloc(1, sizeof *e); e->magic = EVENT; *p = e; live++; return OK;
}
int cudaEventDestroy(void *p) { Event *e = p; if (e->magic != EVENT) return INVALID; free(e); live--; return OK; }
int cudaEventRecord(void *p, void *stream) {
    Event *e = p; Stream *s = stream;
    if (e->magic != EVENT || s->magic != STREAM) return INVALID;
    e->ns = now(); e->recorded = 1; e->asked = 0; return OK;
}
int cudaEventQuery(void *p) { Event *e = p; if (e->magic != EVENT || !e->recorded) return INVALID; return e->asked++ ? OK : NOT_READY; }
int cudaEventElapsedTime(float *ms, void *a, void *b) {
    Event *x = a, *y = b;
    if (x->magic != EVENT || y->magic != EVENT || !x->recorded || !y->recorded) return INVALID;
    *ms = (float)((y->ns - x->ns) / 1e6); return OK;
}
int cudaStreamBeginCapture(void *p, int mode) {
    Stream *s = p;
    if (s->magic != STREAM || mode != 1) return INVALID;
    s->capturing = 1; s->works = 0; capturing_stream = s; return OK;
}
int cudaStreamEndCapture(void *p, void **graph) {
    Stream *s = p;
    if (s->magic != STREAM || !s->capturing) return INVALID;
    s->capturing = 0; *graph = 0;
    if (fail_capture) return INVALID;
    Graph *g = calloc(1, sizeof *g); g->magic = GRAPH; g->works = s->works; *graph = g; live++; return OK;
}
static int instantiate(void **exec, void *graph) {
    Graph *g = graph;
    if (g->magic != GRAPH) return INVALID;
    Graph *e = calloc(1, sizeof *e); e->magic = EXEC; e->works = g->works; *exec = e; live++; return OK;
}
#ifdef WITH_FLAGS
int cudaGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) { return flags ? INVALID : instantiate(exec, graph); }
#endif
#if VERSION >= 12000
int cudaGraphInstantiate(void **exec, void *graph, unsigned long long flags) { return flags ? INVALID : instantiate(exec, graph); }
#else
int cudaGraphInstantiate(void **exec, void *graph, void *node, char *log, size_t size) { return node || log || size ? INVALID : instantiate(exec, graph); }
#endif
int cudaGraphLaunch(void *exec, void *stream) {
    Graph *e = exec; Stream *s = stream;
    if (e->magic != EXEC || s->magic != STREAM) return INVALID;
    launches++;
    for (int i = 0; i < e->works; i++) fake_work(s);
    return OK;
}
int cudaGraphExecDestroy(void *p) { Graph *g = p; if (g->magic != EXEC) return INVALID; free(g); live--; return OK; }
int cudaGraphDestroy(void *p) { Graph *g = p; if (g->magic != GRAPH) return INVALID; free(g); live--; return OK; }
