/* The few things of SPDK that kvring uses, behind an ABI that does not change with SPDK's structs.
 *
 * Numbers are of fixed size, structs grow only by a new KVRING_SPDK_ABI. A function that fails returns a negative errno.
 * tests/fake-spdk implements the same. */
#ifndef KVRING_SPDK_H
#define KVRING_SPDK_H

#include <stddef.h>
#include <stdint.h>

#define KVRING_SPDK_ABI 1

struct kvring_spdk_controller;
struct kvring_spdk_qpair;

struct kvring_spdk_env {
	/* DPDK memory without hugepages: enough for TCP, not for PCIe. */
	uint32_t no_huge;
	/* Look at no PCI device. */
	uint32_t no_pci;
	/* DPDK memory in MiB. */
	uint32_t memory_mib;
	/* The CPU that the environment thinks it runs on; the caller's affinity is not changed. */
	uint32_t cpu;
};

struct kvring_spdk_namespace {
	uint64_t bytes;
	uint32_t sector_bytes;
	uint32_t metadata_bytes;
	/* Bytes of one command; larger transfers are split by the driver. */
	uint32_t transfer_bytes_max;
	uint32_t nsid;
	/* Zero-terminated. */
	char serial[24];
	char model[44];
	char firmware[12];
};

struct kvring_spdk_done {
	uint64_t tag;
	/* 0, or a negative errno: the command has failed. */
	int32_t result;
	uint32_t reserved;
};

uint32_t kvring_spdk_abi(void);
const char *kvring_spdk_version(void);

/* Once in a process, from a thread of its own (it is pinned). */
int32_t kvring_spdk_env_init(const struct kvring_spdk_env *env);

/* Memory that a device may move bytes to and from, for as long as the process lives: 2 MiB aligned, `fd` at `offset` is
 * what is mapped there, and what comes before and after it in the file lies before and after it in memory. */
int32_t kvring_spdk_memory_register(void *memory, uint64_t bytes, int32_t fd, uint64_t offset);
/* Memory that any device takes; NULL if there is none. */
void *kvring_spdk_dma_alloc(uint64_t bytes);
void kvring_spdk_dma_free(void *memory);

/* `transport_id` in SPDK's words: "trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:4420 subnqn:...". Waits. */
int32_t kvring_spdk_connect(const char *transport_id, struct kvring_spdk_controller **controller);
/* To be called now and then, by one thread: keeps the connection alive. Negative: the controller has failed. */
int32_t kvring_spdk_poll_admin(struct kvring_spdk_controller *controller);
/* Its qpairs are freed before. */
void kvring_spdk_detach(struct kvring_spdk_controller *controller);
/* nsid 0: the first that is active. */
int32_t kvring_spdk_namespace(struct kvring_spdk_controller *controller, uint32_t nsid,
			      struct kvring_spdk_namespace *out);
/* The SMART / health log, 512 bytes. Waits; by the thread that polls for admin completions. */
int32_t kvring_spdk_health(struct kvring_spdk_controller *controller, void *page);

/* A pair of queues, for one thread at a time: at most `depth` transfers in flight. */
int32_t kvring_spdk_qpair_new(struct kvring_spdk_controller *controller, uint32_t nsid, uint32_t depth,
			      struct kvring_spdk_qpair **qpair);
/* Transfers in flight end first, or are cut off: afterwards nothing is moved. */
void kvring_spdk_qpair_free(struct kvring_spdk_qpair *qpair);
/* Begins a transfer. -EAGAIN: there is no room now. */
int32_t kvring_spdk_submit(struct kvring_spdk_qpair *qpair, int32_t write, void *memory, uint64_t sector,
			   uint32_t sectors, uint64_t tag);
int32_t kvring_spdk_flush(struct kvring_spdk_qpair *qpair, uint64_t tag);
/* Says what is over, at most `max` of it. Negative: the pair has failed; what was in flight is said by further calls,
 * unless the device moves bytes by itself and may be doing so yet: then it is never said. */
int32_t kvring_spdk_poll(struct kvring_spdk_qpair *qpair, struct kvring_spdk_done *done, uint32_t max);

#endif
