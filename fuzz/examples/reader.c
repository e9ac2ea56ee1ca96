/*
 * A small reader of libxc images with five planted bugs: something for `migstream fuzz` to find.
 *
 * It prints what is in an image, and exits with 1 and one line where it refuses one. A sound image never
 * trips it. The bugs are of the kind that real readers of this format had; each is marked, and each shows
 * itself in another function, where AddressSanitizer sees it, or as a hang.
 *
 *     gcc -O1 -g -fsanitize=address -o reader fuzz/examples/reader.c
 *     ./reader IMAGE
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE 4096u
#define PAGES (1u << 20) /* of guest memory that it has room for: 4 GiB */
#define OPTIONAL 0x80000000u
#define HVM_PARAMS_KNOWN 39
#define NOINLINE __attribute__((noinline)) /* so that a report names the function */

enum { END = 0x00, PAGE_DATA = 0x01, TSC_INFO = 0x08, HVM_CONTEXT = 0x09, HVM_PARAMS = 0x0a,
       TOOLSTACK = 0x0b, CHECKPOINT = 0x0e, DIRTY_PFNS = 0x0f, LAST_TYPE = 0x12 };

struct body {
    const uint8_t *octets;
    uint32_t length; /* without padding */
};

static uint32_t *slots;                        /* each page's place in the image, in pages' order */
static uint64_t params[HVM_PARAMS_KNOWN];

static void refuse(const char *reason)
{
    printf("refused: %s\n", reason);
    exit(1);
}

static uint32_t u32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint64_t u64(const uint8_t *at)
{
    return u32(at) | (uint64_t)u32(at + 4) << 32;
}

static uint32_t big_endian(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
}

static bool has_data(uint64_t entry)
{
    return entry >> 60 < 0xd;
}

static NOINLINE void place(uint64_t pfn, uint32_t number)
{
    /* BUG c-1: a PFN is an index, whatever the size of memory. */
    slots[pfn] = number;
}

static NOINLINE void page_data(struct body body)
{
    if (body.length < 8)
        refuse("PAGE_DATA without its head");
    uint32_t count = u32(body.octets);
    /* BUG c-2: for a count of 2^29 and more this overflows, and a short body is long enough. */
    if (body.length < 8 + count * 8)
        refuse("PAGE_DATA is too short for its entries");
    uint64_t pages = 0;
    for (uint32_t i = 0; i < count; i++)
        pages += has_data(u64(body.octets + 8 + (uint64_t)i * 8));
    if (body.length != 8 + (uint64_t)count * 8 + pages * PAGE)
        refuse("PAGE_DATA has another number of pages than its entries say");
    for (uint32_t i = 0, number = 0; i < count; i++) {
        uint64_t entry = u64(body.octets + 8 + (uint64_t)i * 8);
        place(entry & ((1ull << 52) - 1), has_data(entry) ? ++number : 0);
    }
    printf("%" PRIu32 " pages\n", count);
}

static NOINLINE void hvm_context(struct body body)
{
    uint8_t *context = malloc(body.length);
    if (!context)
        refuse("no memory for HVM_CONTEXT");
    /* BUG c-3: the padding is copied too, into what has room for the body. */
    memcpy(context, body.octets, (body.length + 7) & ~7u);
    printf("HVM context of %" PRIu32 " octets:", body.length);
    for (uint32_t i = 0; i < body.length && i < 8; i++)
        printf(" %02x", context[i]);
    printf("\n");
    free(context);
}

static NOINLINE void hvm_params(struct body body)
{
    if (body.length < 8 || body.length != 8 + (uint64_t)u32(body.octets) * 16)
        refuse("HVM_PARAMS of another length than its count says");
    for (uint32_t i = 0; i < u32(body.octets); i++)
        /* BUG c-4: the index comes from the stream, and the table ends with the parameters known. */
        params[u64(body.octets + 8 + i * 16)] = u64(body.octets + 16 + i * 16);
}

static void record(uint32_t type, struct body body)
{
    if (type == PAGE_DATA)
        page_data(body);
    else if (type == HVM_CONTEXT)
        hvm_context(body);
    else if (type == HVM_PARAMS)
        hvm_params(body);
    else if (type == TSC_INFO && body.length != 24)
        refuse("X86_TSC_INFO of another length than 24");
    else if (type == TOOLSTACK || type == CHECKPOINT || type == DIRTY_PFNS || type > LAST_TYPE)
        refuse("a record that does not belong here");
}

static NOINLINE void records(const uint8_t *image, uint64_t size, uint64_t position)
{
    while (position + 8 <= size) {
        uint32_t type = u32(image + position);
        struct body body = { image + position + 8, u32(image + position + 4) };
        if (type == END && body.length == 0)
            return;
        /* BUG c-5: nothing to skip, but the record's own header: the same record comes again, for ever. */
        if (type & OPTIONAL && body.length == 0)
            continue;
        uint64_t padded = ((uint64_t)body.length + 7) & ~7ull;
        if (padded > size - position - 8)
            refuse("the image ends within a record");
        if (!(type & OPTIONAL))
            record(type, body);
        position += 8 + padded;
    }
    refuse("the image ends without END");
}

int main(int argc, char **argv)
{
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (!file || fseek(file, 0, SEEK_END))
        refuse("give an image");
    uint64_t size = ftell(file);
    uint8_t *image = malloc(size + 1);
    slots = calloc(PAGES, sizeof *slots);
    rewind(file);
    if (!image || !slots || fread(image, 1, size, file) != size)
        refuse("cannot be read");
    if (size < 40 || u64(image) != UINT64_MAX || big_endian(image + 8) != 0x58454e46)
        refuse("not a libxc image");
    if (big_endian(image + 12) < 2 || big_endian(image + 12) > 3 || image[17] & 1)
        refuse("a version that is not 2 or 3, or big-endian");
    records(image, size, 40);
    for (int i = 0; i < HVM_PARAMS_KNOWN; i++)
        if (params[i])
            printf("HVM parameter %d: %#" PRIx64 "\n", i, params[i]);
    free(slots);
    free(image);
    return 0;
}
