/* A GPU for one launch, as far as compiled kernels of fastrnn can tell: warps of 32 lanes, all programs resident, shared
 * and global memory, barriers and atomics. translate.py writes `step` for a kernel's PTX on top of this; execute.py
 * fills the Machine and calls `run` (schedule.h).
 *
 * Registers lie as [register][lane]. Lanes of a warp that parted run one after the other, the one furthest behind first.
 *
 * What is checked, beyond what a GPU does:
 *   bounds     every access lies in one of the launch's tensors, or in the program's shared memory
 *   shared     two warps that touch the same bytes, one of them writing, have a barrier between them: each access carries
 *              the number of barriers its program, and its cluster, had passed
 *   global     a read of another program's write is ordered after it by release and acquire: each program publishes how
 *              many of its barriers came before a release; and it does not go through L1, which is not coherent
 *   sent       a strong read may meet one strong store of another program, and finds what it stored or what was there
 *              before: a weak write, which must be ordered before both. A second store of something else is an error.
 *              Strong stores arrive one by one, in any order and late, but before what their program releases
 *   progress   warps that only wait for one another are a deadlock
 * Not modelled: order of writes after reads in global memory, mbarriers, TMA, wgmma, warps of one program that meet at
 * barriers by groups.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RUNS, AT_BARRIER, AT_CLUSTER_BARRIER, DONE };
enum { THROUGH_L1, PAST_L1, STRONG };
enum { NOBODY = 0, SEVERAL = 0xffff };

/* The last weak write, and the strong one (st.relaxed) that came after it; program 0: nobody in this launch. */
typedef struct { uint32_t program, warp, epoch, line, sender, sent_at, sent, width; } GlobalWrite;
typedef struct { uint64_t address; uint8_t value[8]; uint32_t size, program; } Sent;  // a strong store on its way
typedef struct { uint16_t warp; uint32_t epoch, cluster_epoch, line; } SharedAccess;  // warp: 1 + rank * 64 + index
typedef struct { SharedAccess write, local_read, remote_read; } SharedCell;
typedef struct { uint8_t *start; uint64_t size; GlobalWrite *writes; } Range;
typedef struct { uint64_t address; uint32_t *published; } Sync;
typedef struct { uint32_t to, lane; uint64_t from; int size, filled, group, line; } Copy;

typedef struct Warp Warp;
typedef struct Program {
  uint32_t id[3], number, rank, epoch;
  uint8_t *shared;
  SharedCell *cells;
  Warp *warps;
  struct Program *cluster;  // its first program
} Program;
struct Warp {
  uint64_t *r64;
  uint32_t *r32;
  uint16_t *r16;
  uint8_t *p;
  int32_t block[32];
  uint32_t alive, index;
  int state, ordered;  // ordered: its last arrival at the cluster barrier published its shared memory (ptx.publishes)
  Program *program;
  uint32_t *known;  // of each program, how many barriers came before what this warp has acquired
  Copy *copies;
  int copy_count, copy_room, group;
};

typedef struct {
  uint32_t grid[3], threads, cluster;
  uint32_t shared_bytes, r64, r32, r16, p, blocks;
  uint64_t seed, patience;
  const uint8_t *parameters;
  Range *ranges;
  uint32_t range_count;
  uint64_t *executed;  // how often a warp ran each block
  char *message;
  int line;
} Machine;

static Machine *M;
static jmp_buf failed;
static Program *programs;
static uint32_t program_count, warp_count, cluster_epoch;
static Sync *syncs;
static uint32_t sync_count;
static Sent *sent;
static uint32_t sent_count, sent_room;
static uint64_t changes;  // of what a program may wait for: stores and atomics in global memory

static int step(Warp *w, int quantum);

static void fail(int line, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(M->message, 400, format, values);
  va_end(values);
  M->line = line;
  longjmp(failed, 1);
}

/* ---- values ---- */
#define L for (int l = 0; l < 32; l++) if (m >> l & 1)
#define AS(T, U, x) ({ U u_ = (x); T t_; memcpy(&t_, &u_, sizeof t_); t_; })
#define FLOAT(x) AS(float, uint32_t, x)
#define BITS(x) AS(uint32_t, float, x)
static inline float half_to_float(uint16_t h) { return (float)AS(_Float16, uint16_t, h); }
static inline uint16_t float_to_half(float f) { return AS(uint16_t, _Float16, (_Float16)f); }
static inline float bfloat_to_float(uint16_t h) { return FLOAT((uint32_t)h << 16); }
static inline uint16_t float_to_bfloat(float f) {
  uint32_t u = BITS(f);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
/* As far off as PTX allows, 2^-11 of the result, either way: what passes here does not rest on a good implementation. */
static inline float tanh_approx(float x) {
  float error = ((BITS(x) * 2654435761u >> 16) & 1 ? 1.0f : -1.0f) * 0x1p-11f, t = tanhf(x) * (1.0f + error);
  return fminf(fmaxf(t, -1.0f), 1.0f);
}
static inline float tf32(uint32_t u) { return FLOAT(u & 0xffffe000u); }
static inline uint64_t pack2(float low, float high) { return BITS(low) | (uint64_t)BITS(high) << 32; }

/* ---- global memory ---- */
static Range *range_of(uint64_t address, uint64_t size, int line) {
  static uint32_t last;
  for (uint32_t tried = 0; tried < M->range_count; tried++) {
    Range *r = &M->ranges[(last + tried) % M->range_count];
    uint64_t offset = address - (uint64_t)r->start;
    if (offset < r->size && offset + size <= r->size) {
      last = r - M->ranges;
      return r;
    }
  }
  fail(line, "out of bounds: %d bytes at 0x%lx lie in no tensor of this launch", (int)size, (unsigned long)address);
  return NULL;
}

/* Granules of two bytes: the smallest that our kernels store. */
static void read_global(Warp *w, void *out, uint64_t address, int size, int each, int how, int line) {
  Range *r = range_of(address, size, line);
  uint64_t offset = address - (uint64_t)r->start;
  for (int i = 0; i < size; i += 2) {
    GlobalWrite *write = &r->writes[(offset + i) / 2];
    if (how != STRONG && write->sender && write->sender - 1 != w->program->number)
      fail(line, "race: reads weakly what another program stores strongly at line %d", write->sent_at);
    if (how == STRONG && write->sender && write->width != each)
      fail(line, "race: reads %d bytes where line %d stores %d at once", each, write->sent_at, write->width);
    if (!write->program) continue;
    Program *writer = &programs[write->program - 1], *reader = w->program;
    if (writer == reader) {
      if (write->warp != w->index && write->epoch == reader->epoch)
        fail(line, "race: reads what another warp wrote at line %d, with no barrier between them", write->line);
    } else {
      if (how == THROUGH_L1)
        fail(line, "stale: reads through L1, which may hold an older value, what another program wrote at line %d",
             write->line);
      if (w->known[writer->number] <= write->epoch)
        fail(line, "race: reads what another program wrote at line %d, with no release and acquire between them",
             write->line);
    }
  }
  memcpy(out, (void *)address, size);
}

static void write_global(Warp *w, uint64_t address, const void *value, int size, int how, int line) {
  Range *r = range_of(address, size, line);
  uint64_t offset = address - (uint64_t)r->start;
  uint32_t me = w->program->number + 1;
  for (int i = 0; i < size; i += 2) {
    GlobalWrite *write = &r->writes[(offset + i) / 2];
    if (write->program && write->program != me && w->known[write->program - 1] <= write->epoch)
      fail(line, "race: writes where another program wrote at line %d", write->line);
    if (write->sender && write->sender != me)
      fail(line, "race: writes where another program stores strongly at line %d", write->sent_at);
    if (how != STRONG) {
      *write = (GlobalWrite){me, w->index, w->program->epoch, line, NOBODY, 0};
      continue;
    }
    if (write->program == me && write->warp != w->index && write->epoch == w->program->epoch)
      fail(line, "race: writes where another warp wrote at line %d, with no barrier between them", write->line);
    uint16_t half;
    memcpy(&half, (uint8_t *)value + i, 2);
    if (write->sender && write->sent != half)
      fail(line, "sent twice: stores where line %d stored, and nothing was written between", write->sent_at);
    write->sender = me, write->sent_at = line, write->sent = half, write->width = size;
  }
  if (how == STRONG) {
    if (sent_count == sent_room) sent = realloc(sent, (sent_room = 2 * sent_room + 64) * sizeof *sent);
    sent[sent_count] = (Sent){.address = address, .size = size, .program = me};
    memcpy(sent[sent_count++].value, value, size);
  } else {
    memcpy((void *)address, value, size);
  }
  changes++;
}

static void deliver(uint32_t i) {
  memcpy((void *)sent[i].address, sent[i].value, sent[i].size);
  sent[i] = sent[--sent_count];
  changes++;
}

/* The vector of what was published at an address that programs synchronise through. */
static uint32_t *published_at(uint64_t address) {
  for (uint32_t i = 0; i < sync_count; i++)
    if (syncs[i].address == address) return syncs[i].published;
  syncs = realloc(syncs, (sync_count + 1) * sizeof *syncs);
  syncs[sync_count] = (Sync){address, calloc(program_count, 4)};
  return syncs[sync_count++].published;
}

static void join(uint32_t *to, const uint32_t *from) {
  for (uint32_t i = 0; i < program_count; i++)
    if (from[i] > to[i]) to[i] = from[i];
}

static void synchronise(Warp *w, uint64_t address, int acquire, int release) {
  if (!acquire && !release) return;
  uint32_t *published = published_at(address);
  if (acquire) join(w->known, published);
  if (release) {
    for (uint32_t i = sent_count; i-- > 0;)
      if (sent[i].program == w->program->number + 1) deliver(i);
    join(published, w->known);
    published[w->program->number] = w->program->epoch;
  }
}

/* ---- shared memory: addresses are offsets, with 1 + rank in the upper byte where mapa made them ---- */
static Program *owner(Warp *w, uint32_t address, int line) {
  if (address >> 24 > M->cluster) fail(line, "out of bounds: rank %u of a cluster of %u", (address >> 24) - 1, M->cluster);
  return address >> 24 ? w->program->cluster + (address >> 24) - 1 : w->program;
}

static int ordered(Warp *w, Program *at, SharedAccess *before) {
  uint32_t rank = (before->warp - 1) / 64;
  if (before->warp != SEVERAL && rank == w->program->rank)
    return (before->warp - 1) % 64 == w->index || before->epoch != w->program->epoch;
  if (before->warp == SEVERAL && at == w->program) return before->epoch != at->epoch;
  return before->cluster_epoch != cluster_epoch;
}

/* Where an access lies; value: what it writes, NULL if it reads. Warps may write the same byte to the same place.
   A cell is a byte: predicates of two warps lie side by side in one word. */
static uint8_t *touch_shared(Warp *w, uint32_t address, int size, const uint8_t *value, int line) {
  Program *at = owner(w, address, line);
  uint32_t offset = address & 0xffffff;
  if (offset + size > M->shared_bytes)
    fail(line, "out of bounds: %d bytes at %u of %u bytes of shared memory", size, offset, M->shared_bytes);
  SharedAccess now = {1 + w->program->rank * 64 + w->index, w->program->epoch, cluster_epoch, line};
  for (int i = 0; i < size; i++) {
    SharedCell *cell = &at->cells[offset + i];
    if (value && at->shared[offset + i] == value[i]) {
      if (!cell->write.warp || ordered(w, at, &cell->write)) cell->write = now;
      continue;
    }
    if (cell->write.warp && !ordered(w, at, &cell->write))
      fail(line, "race: %s shared memory that another warp wrote at line %d, with no barrier between them",
           value ? "writes" : "reads", cell->write.line);
    if (value) {
      if (cell->local_read.warp && !ordered(w, at, &cell->local_read))
        fail(line, "race: writes shared memory that another warp read at line %d, with no barrier between them",
             cell->local_read.line);
      if (cell->remote_read.warp && !ordered(w, at, &cell->remote_read))
        fail(line, "race: writes shared memory that another program read at line %d, with no barrier between them",
             cell->remote_read.line);
      cell->write = now;
    } else {
      SharedAccess *read = at == w->program ? &cell->local_read : &cell->remote_read;
      int current = at == w->program ? read->epoch == now.epoch : read->cluster_epoch == now.cluster_epoch;
      int others = read->warp && current && read->warp != now.warp;
      *read = now;
      if (others) read->warp = SEVERAL;
    }
  }
  return at->shared + offset;
}

static void read_shared(Warp *w, void *out, uint32_t address, int size, int line) {
  memcpy(out, touch_shared(w, address, size, NULL, line), size);
}
static void write_shared(Warp *w, uint32_t address, const void *value, int size, int line) {
  memcpy(touch_shared(w, address, size, value, line), value, size);
}

/* cp.async: nothing arrives before its group is waited for. */
static void copy_later(Warp *w, uint32_t lane, uint32_t to, uint64_t from, int size, int filled, int line) {
  if (w->copy_count == w->copy_room)
    w->copies = realloc(w->copies, (w->copy_room = 2 * w->copy_room + 64) * sizeof *w->copies);
  w->copies[w->copy_count++] = (Copy){to, lane, from, size, filled, w->group, line};
}
static void wait_copies(Warp *w, int groups_left) {
  int kept = 0;
  for (int i = 0; i < w->copy_count; i++) {
    Copy c = w->copies[i];
    if (c.group >= w->group - groups_left) {
      w->copies[kept++] = c;
      continue;
    }
    uint8_t value[16] = {0};
    if (c.filled) read_global(w, value, c.from, c.filled, c.filled, PAST_L1, c.line);
    write_shared(w, c.to, value, c.size, c.line);
  }
  w->copy_count = kept;
}

/* ---- matrices ---- */
static void load_matrices(Warp *w, uint32_t **d, int n, const uint32_t *address, int transposed, int line) {
  for (int i = 0; i < n; i++) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; r++) read_shared(w, rows[r], address[i * 8 + r], 16, line);
    for (int l = 0; l < 32; l++) {
      int r = l / 4, c = l % 4 * 2;
      d[i][l] = transposed ? rows[c][r] | (uint32_t)rows[c + 1][r] << 16 : rows[r][c] | (uint32_t)rows[r][c + 1] << 16;
    }
  }
}
static void store_matrices(Warp *w, const uint32_t *address, uint32_t **s, int n, int transposed, int line) {
  for (int i = 0; i < n; i++) {
    uint16_t rows[8][8];
    for (int l = 0; l < 32; l++)
      for (int half = 0; half < 2; half++) {
        int r = l / 4, c = l % 4 * 2 + half;
        *(transposed ? &rows[c][r] : &rows[r][c]) = s[i][l] >> (16 * half);
      }
    for (int r = 0; r < 8; r++) write_shared(w, address[i * 8 + r], rows[r], 16, line);
  }
}

/* d[16][8] = a[16][K] b[K][8] + c in fp32, the fragments as the PTX ISA lays them out over a warp. */
static void multiply(uint32_t **d, uint32_t **a, uint32_t **b, uint32_t **c, int K, int packed, float (*low)(uint16_t)) {
  float A[16][16], B[16][8], C[16][8];
  for (int l = 0; l < 32; l++) {
    int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++) {
      int row = g + (i & 1) * 8;
      if (packed) {
        int k = t * 2 + (i >> 1) * 8;
        A[row][k] = low(a[i][l]);
        A[row][k + 1] = low(a[i][l] >> 16);
      } else {
        A[row][t + (i >> 1) * 4] = tf32(a[i][l]);
      }
      C[g + (i >> 1) * 8][t * 2 + (i & 1)] = FLOAT(c[i][l]);
    }
    for (int i = 0; i < 2; i++) {
      if (packed) {
        B[t * 2 + i * 8][g] = low(b[i][l]);
        B[t * 2 + i * 8 + 1][g] = low(b[i][l] >> 16);
      } else {
        B[t + i * 4][g] = tf32(b[i][l]);
      }
    }
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < K; k++)
      for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) d[i][l] = BITS(C[l / 4 + (i >> 1) * 8][l % 4 * 2 + (i & 1)]);
}
