/* Barriers, and the schedule that runs all warps of all programs in turns. After machine.h and before `step`. */
static void pass(Warp **warps, uint32_t count) {
  for (uint32_t i = 1; i < count; i++) join(warps[0]->known, warps[i]->known);
  for (uint32_t i = 0; i < count; i++) {
    memcpy(warps[i]->known, warps[0]->known, 4 * program_count);
    if (warps[i]->state != DONE) warps[i]->state = RUNS;
  }
}

static int all_at(Warp **warps, uint32_t count, int state) {
  int any = 0;
  for (uint32_t i = 0; i < count; i++) {
    any |= warps[i]->state == state;
    if (warps[i]->state != state && warps[i]->state != DONE) return 0;
  }
  return any;
}

static void open_barriers(Program *p) {
  Warp *warps[64 * 16];
  for (uint32_t i = 0; i < warp_count; i++) warps[i] = &p->warps[i];
  if (all_at(warps, warp_count, AT_BARRIER)) {
    pass(warps, warp_count);
    p->epoch++;
  }
  uint32_t count = 0;
  for (uint32_t r = 0; r < M->cluster; r++)
    for (uint32_t i = 0; i < warp_count; i++) warps[count++] = &p->cluster[r].warps[i];
  if (all_at(warps, count, AT_CLUSTER_BARRIER)) {
    int release = 1;
    for (uint32_t i = 0; i < count; i++) release &= warps[i]->ordered;
    if (release) {
      pass(warps, count);
      for (uint32_t r = 0; r < M->cluster; r++) p->cluster[r].epoch++;
      cluster_epoch++;
    } else {
      for (uint32_t i = 0; i < count; i++)
        if (warps[i]->state != DONE) warps[i]->state = RUNS;
    }
  }
}

static uint64_t random_state;
static uint32_t below(uint32_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (random_state >> 16) % n;
}

static void *poisoned(size_t size) { return memset(malloc(size + 64), 0xff, size + 64); }

static void simulate(void) {
  static const int quanta[] = {1, 3, 20, 1000};
  uint32_t left = program_count * warp_count;
  uint64_t seen = changes, idle = 0;
  random_state = 0x9e3779b97f4a7c15ull * (M->seed + 1);
  for (uint32_t turn = 0; left; turn++) {
    /* Seed 0 takes the warps in turn; others favour some programs over others for a while, by chance. */
    Program *p = &programs[M->seed ? below(program_count) : turn / warp_count % program_count];
    for (uint32_t round = M->seed ? 1 + below(2 * warp_count) : 1; round; round--) {
      Warp *w = &p->warps[M->seed ? below(warp_count) : turn % warp_count];
      if (w->state != RUNS) continue;
      w->state = step(w, M->seed ? quanta[below(4)] : 200);
      if (w->state == DONE) left--, changes++;
      if (w->state != RUNS) open_barriers(p);
    }
    for (uint32_t some = M->seed ? below(1 + sent_count / 4) : sent_count; some; some--) deliver(below(sent_count));
    if (sent_count && !below(8)) deliver(below(sent_count));
    idle = changes == seen ? idle + 1 : 0;
    seen = changes;
    if (idle > (uint64_t)M->patience * program_count) fail(0, "deadlock: %u warps wait, and nothing changes", left);
  }
}

int run(Machine *machine) {
  M = machine;
  program_count = M->grid[0] * M->grid[1] * M->grid[2];
  warp_count = M->threads / 32;
  sync_count = changes = cluster_epoch = sent_count = sent_room = 0;
  syncs = NULL;
  sent = NULL;
  programs = calloc(program_count, sizeof *programs);
  for (uint32_t i = 0; i < program_count; i++) {
    Program *p = &programs[i];
    p->number = i;
    p->id[0] = i % M->grid[0];
    p->id[1] = i / M->grid[0] % M->grid[1];
    p->id[2] = i / M->grid[0] / M->grid[1];
    p->rank = i % M->cluster;
    p->cluster = p - p->rank;
    p->shared = poisoned(M->shared_bytes);
    p->cells = calloc(M->shared_bytes + 1, sizeof *p->cells);
    p->warps = calloc(warp_count, sizeof *p->warps);
    for (uint32_t j = 0; j < warp_count; j++) {
      Warp *w = &p->warps[j];
      w->r64 = poisoned(M->r64 * 256ull);
      w->r32 = poisoned(M->r32 * 128ull);
      w->r16 = poisoned(M->r16 * 64ull);
      w->p = poisoned(M->p * 32ull);
      w->alive = ~0u;
      w->index = j;
      w->program = p;
      w->known = calloc(program_count, 4);
    }
  }
  int failure = setjmp(failed);
  if (!failure) simulate();
  for (uint32_t i = 0; i < program_count; i++) {
    for (uint32_t j = 0; j < warp_count; j++) {
      Warp *w = &programs[i].warps[j];
      free(w->r64), free(w->r32), free(w->r16), free(w->p), free(w->known), free(w->copies);
    }
    free(programs[i].shared), free(programs[i].cells), free(programs[i].warps);
  }
  for (uint32_t i = 0; i < sync_count; i++) free(syncs[i].published);
  free(syncs), free(programs);
  return failure;
}
