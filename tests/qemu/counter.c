/*
 * What the tiny guest does: it counts, and writes memory that it can check.
 *
 * Every 10 ms it overwrites the next pages of a working set, round robin, at the chosen rate. Each page is checked
 * just before it is overwritten: all of its words have to be those of the last time round. So a page that a migration
 * brought in an older state is found within one turn of the working set, and said on the console:
 *
 *     COUNT n                                         every 100 ms, n from 1 without a gap
 *     CORRUPT page p word w: expected x, found y      and the guest stops
 *
 * From the environment (the kernel hands it the words of its command line): dirty_rate and working_set, in MiB (a second).
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { WORDS = 512, PAGES_PER_MIB = 256, TICKS_PER_SECOND = 100, TICKS_PER_COUNT = 10 };

static long setting(const char *name, long otherwise)
{
	const char *value = getenv(name);
	return value ? atol(value) : otherwise;
}

/* What a word holds after the turn'th write of all: never twice the same, so that no stale page passes. */
static uint64_t pattern(uint64_t turn, uint64_t word)
{
	return (turn * WORDS + word) * 0x9E3779B97F4A7C15u;
}

static void check(const uint64_t *page, uint64_t number, uint64_t turn)
{
	for (uint64_t word = 0; word < WORDS; word++) {
		uint64_t expected = pattern(turn, word);
		if (page[word] != expected) {
			printf("CORRUPT page %lu word %lu: expected %016lx, found %016lx\n", number, word, expected, page[word]);
			exit(1);
		}
	}
}

static void sleep_until_next(struct timespec *tick)
{
	tick->tv_nsec += 1000000000L / TICKS_PER_SECOND;
	if (tick->tv_nsec >= 1000000000L) {
		tick->tv_nsec -= 1000000000L;
		tick->tv_sec++;
	}
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, tick, NULL);
}

int main(void)
{
	uint64_t n_pages = setting("working_set", 20) * PAGES_PER_MIB;
	uint64_t pages_per_tick = setting("dirty_rate", 10) * PAGES_PER_MIB / TICKS_PER_SECOND;
	uint64_t *memory = mmap(NULL, n_pages * WORDS * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) {
		perror("working_set");
		return 1;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);

	struct timespec tick;
	clock_gettime(CLOCK_MONOTONIC, &tick);
	uint64_t turn = 0;
	for (uint64_t ticks = 1;; ticks++) {
		for (uint64_t end = turn + pages_per_tick; turn < end; turn++) {
			uint64_t number = turn % n_pages;
			uint64_t *page = memory + number * WORDS;
			if (turn >= n_pages)
				check(page, number, turn - n_pages);
			for (uint64_t word = 0; word < WORDS; word++)
				page[word] = pattern(turn, word);
		}
		if (ticks % TICKS_PER_COUNT == 0)
			printf("COUNT %lu\n", ticks / TICKS_PER_COUNT);
		sleep_until_next(&tick);
	}
}
