#include "dirty/dirty.h"
void dirty_set(uint64_t *map, uint64_t first, uint64_t n) {  }
int64_t dirty_clear(uint64_t *map, uint64_t first, uint64_t n) { return 0; }
int64_t dirty_count(const uint64_t *map, uint64_t first, uint64_t n) { return 0; }
int64_t dirty_clear_ranges(uint64_t *map, uint64_t pages, const uint64_t *addr, const uint64_t *len, uint64_t count) { return 0; }
int64_t dirty_runs(const uint64_t *map, uint64_t first, uint64_t end, uint64_t *starts, uint64_t *lengths, uint64_t max,
                   uint64_t *resume) { return 0; }
void dirty_log_mark(uint64_t *log, uint64_t first, uint64_t n) {  }
void dirty_log_mark_ranges(uint64_t *log, uint64_t pages, const uint64_t *addr, const uint64_t *len, uint64_t count) {  }
int64_t dirty_log_fetch(uint64_t *log, uint64_t *into, uint64_t pages) { return 0; }
int dirty_page_is_zero(const uint8_t *page) { return 0; }
void dirty_digest_pages(const uint8_t *base, uint64_t n, const uint64_t *present, uint64_t first, uint64_t *digests) {  }
void dirty_take_pages(uint64_t *map, const uint64_t *present, const uint8_t *base, uint64_t base_page, uint64_t *cursor,
                      uint64_t end, uint8_t *data, uint64_t *pages, uint64_t max_pages, uint64_t *zeros,
                      uint64_t max_zeros, struct dirty_take *out) {  }
int dirty_uffd_open(void) { return 0; }
int dirty_uffd_register(int uffd, uint64_t start, uint64_t len) { return 0; }
int64_t dirty_pagemap_scan(int pagemap, uint64_t start, uint64_t len, uint64_t first_page, uint64_t *into) { return 0; }
int64_t dirty_cachestat_scan(int fd, uint64_t offset, uint64_t len, uint64_t first_page, uint64_t *into) { return 0; }
