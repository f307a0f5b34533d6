/* kvring_spdk.h over SPDK's NVMe driver: no bdev, no reactor, no spdk_thread. */
#include "kvring_spdk.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "spdk/env.h"
#include "spdk/nvme.h"
#include "spdk/version.h"

struct flight {
	struct kvring_spdk_qpair *qpair;
	uint64_t tag;
	struct flight *next;
};

struct kvring_spdk_controller {
	struct spdk_nvme_ctrlr *ctrlr;
	/* The host moves the bytes: what is cut off moves nothing any more. */
	int is_tcp;
};

/* A log page that is waited for. On the heap: its command may end after the wait. */
struct page {
	void *memory;
	/* 0: under way; 1: there; negative: failed. */
	int state;
	int abandoned;
};

struct kvring_spdk_qpair {
	struct spdk_nvme_ctrlr *ctrlr;
	struct spdk_nvme_ns *ns;
	/* NULL: it was cut off. */
	struct spdk_nvme_qpair *qpair;
	int is_tcp;
	int failed;
	struct flight *flights;
	struct flight *free;
	/* What is over and not said yet: a ring of `depth`. */
	struct kvring_spdk_done *done;
	uint32_t depth;
	uint32_t inflight;
	uint32_t done_first;
	uint32_t done_count;
};

/* What is registered, for vfio-user: it asks which file some memory is (see the linker's --wrap). */
#define REGIONS_MAX 64
static struct {
	char *memory;
	uint64_t bytes;
	int fd;
	uint64_t offset;
} regions[REGIONS_MAX];

int __real_spdk_mem_get_fd_and_offset(void *memory, uint64_t *offset);
int __wrap_spdk_mem_get_fd_and_offset(void *memory, uint64_t *offset);

int __wrap_spdk_mem_get_fd_and_offset(void *memory, uint64_t *offset)
{
	for (int i = 0; i < REGIONS_MAX; i++) {
		char *from = regions[i].memory;
		if (from != NULL && regions[i].fd >= 0 && (char *)memory >= from &&
		    (char *)memory < from + regions[i].bytes) {
			*offset = regions[i].offset + (uint64_t)((char *)memory - from);
			return regions[i].fd;
		}
	}
	return __real_spdk_mem_get_fd_and_offset(memory, offset);
}

uint32_t kvring_spdk_abi(void)
{
	return KVRING_SPDK_ABI;
}

const char *kvring_spdk_version(void)
{
	return SPDK_VERSION_STRING;
}

int32_t kvring_spdk_env_init(const struct kvring_spdk_env *env)
{
	struct spdk_env_opts opts;
	char core_mask[16];

	memset(&opts, 0, sizeof(opts));
	opts.opts_size = sizeof(opts);
	spdk_env_opts_init(&opts);
	snprintf(core_mask, sizeof(core_mask), "[%u]", env->cpu);
	opts.name = "kvring";
	opts.core_mask = core_mask;
	opts.shm_id = -1;
	opts.no_huge = env->no_huge != 0;
	/* A controller in another process maps our memory file by file. */
	opts.hugepage_single_segments = env->no_huge == 0;
	opts.no_pci = env->no_pci != 0;
	opts.mem_size = (int)env->memory_mib;
	return spdk_env_init(&opts) < 0 ? -EIO : 0;
}

int32_t kvring_spdk_memory_register(void *memory, uint64_t bytes, int32_t fd, uint64_t offset)
{
	char *base = (char *)memory - offset;

	if (fd < 0)
		return spdk_mem_register(memory, bytes);
	/* A region is what is known of a mapping, from its file's beginning on: parts come in any order. */
	for (int i = 0; i < REGIONS_MAX; i++) {
		if (regions[i].memory != NULL && (regions[i].memory != base || regions[i].fd != fd))
			continue;
		if (regions[i].bytes < offset + bytes)
			regions[i].bytes = offset + bytes;
		regions[i].fd = fd;
		regions[i].offset = 0;
		regions[i].memory = base;
		break;
	}
	return spdk_mem_register(memory, bytes);
}

void *kvring_spdk_dma_alloc(uint64_t bytes)
{
	return spdk_zmalloc(bytes, 4096, NULL, SPDK_ENV_SOCKET_ID_ANY, SPDK_MALLOC_DMA);
}

void kvring_spdk_dma_free(void *memory)
{
	spdk_free(memory);
}

int32_t kvring_spdk_connect(const char *transport_id, struct kvring_spdk_controller **controller)
{
	struct spdk_nvme_transport_id id;
	struct spdk_nvme_ctrlr_opts opts;

	memset(&id, 0, sizeof(id));
	if (spdk_nvme_transport_id_parse(&id, transport_id) != 0)
		return -EINVAL;
	spdk_nvme_ctrlr_get_default_ctrlr_opts(&opts, sizeof(opts));
	opts.keep_alive_timeout_ms = 30000;
	/* 2^14 ms without an acknowledgement, and the connection is gone. */
	opts.transport_ack_timeout = 14;
	struct kvring_spdk_controller *made = calloc(1, sizeof(*made));
	if (made == NULL)
		return -ENOMEM;
	made->is_tcp = id.trtype == SPDK_NVME_TRANSPORT_TCP;
	made->ctrlr = spdk_nvme_connect(&id, &opts, sizeof(opts));
	if (made->ctrlr == NULL) {
		free(made);
		return -ENXIO;
	}
	*controller = made;
	return 0;
}

int32_t kvring_spdk_poll_admin(struct kvring_spdk_controller *controller)
{
	return spdk_nvme_ctrlr_process_admin_completions(controller->ctrlr);
}

void kvring_spdk_detach(struct kvring_spdk_controller *controller)
{
	spdk_nvme_detach(controller->ctrlr);
	free(controller);
}

static struct spdk_nvme_ns *namespace_of(struct spdk_nvme_ctrlr *ctrlr, uint32_t nsid)
{
	struct spdk_nvme_ns *ns;

	if (nsid == 0)
		nsid = spdk_nvme_ctrlr_get_first_active_ns(ctrlr);
	ns = nsid == 0 ? NULL : spdk_nvme_ctrlr_get_ns(ctrlr, nsid);
	return ns != NULL && spdk_nvme_ns_is_active(ns) ? ns : NULL;
}

/* Padded with spaces, without an end. */
static void copy_text(char *to, size_t room, const int8_t *from, size_t bytes)
{
	while (bytes > 0 && (from[bytes - 1] == ' ' || from[bytes - 1] == 0))
		bytes--;
	if (bytes >= room)
		bytes = room - 1;
	memcpy(to, from, bytes);
	to[bytes] = 0;
}

int32_t kvring_spdk_namespace(struct kvring_spdk_controller *controller, uint32_t nsid,
			      struct kvring_spdk_namespace *out)
{
	const struct spdk_nvme_ctrlr_data *data = spdk_nvme_ctrlr_get_data(controller->ctrlr);
	struct spdk_nvme_ns *ns = namespace_of(controller->ctrlr, nsid);

	if (ns == NULL)
		return -ENODEV;
	memset(out, 0, sizeof(*out));
	out->bytes = spdk_nvme_ns_get_size(ns);
	out->sector_bytes = spdk_nvme_ns_get_sector_size(ns);
	out->metadata_bytes = spdk_nvme_ns_get_md_size(ns);
	out->transfer_bytes_max = spdk_nvme_ns_get_max_io_xfer_size(ns);
	out->nsid = spdk_nvme_ns_get_id(ns);
	copy_text(out->serial, sizeof(out->serial), data->sn, sizeof(data->sn));
	copy_text(out->model, sizeof(out->model), data->mn, sizeof(data->mn));
	copy_text(out->firmware, sizeof(out->firmware), (const int8_t *)data->fr, sizeof(data->fr));
	return 0;
}

static void log_done(void *arg, const struct spdk_nvme_cpl *cpl)
{
	struct page *page = arg;

	page->state = spdk_nvme_cpl_is_error(cpl) ? -EIO : 1;
	if (page->abandoned) {
		spdk_free(page->memory);
		free(page);
	}
}

#define HEALTH_SECONDS 5

int32_t kvring_spdk_health(struct kvring_spdk_controller *controller, void *out)
{
	struct page *page = calloc(1, sizeof(*page));
	uint64_t until = spdk_get_ticks() + HEALTH_SECONDS * spdk_get_ticks_hz();
	int rc = -ENOMEM, state;

	if (page != NULL)
		page->memory = spdk_zmalloc(512, 4096, NULL, SPDK_ENV_SOCKET_ID_ANY, SPDK_MALLOC_DMA);
	if (page != NULL && page->memory != NULL)
		rc = spdk_nvme_ctrlr_cmd_get_log_page(controller->ctrlr, SPDK_NVME_LOG_HEALTH_INFORMATION,
						      SPDK_NVME_GLOBAL_NS_TAG, page->memory, 512, 0, log_done,
						      page);
	if (rc != 0) {
		if (page != NULL)
			spdk_free(page->memory);
		free(page);
		return rc;
	}
	while (rc >= 0 && page->state == 0 && spdk_get_ticks() < until)
		rc = spdk_nvme_ctrlr_process_admin_completions(controller->ctrlr);
	if (page->state == 0) {
		/* Its end, whenever that comes, frees it. */
		page->abandoned = 1;
		return rc < 0 ? rc : -ETIMEDOUT;
	}
	state = page->state;
	if (state == 1)
		memcpy(out, page->memory, 512);
	spdk_free(page->memory);
	free(page);
	return state == 1 ? 0 : state;
}

int32_t kvring_spdk_qpair_new(struct kvring_spdk_controller *controller, uint32_t nsid, uint32_t depth,
			      struct kvring_spdk_qpair **out)
{
	struct spdk_nvme_io_qpair_opts opts;
	struct kvring_spdk_qpair *made = calloc(1, sizeof(*made));

	if (made == NULL)
		return -ENOMEM;
	made->ctrlr = controller->ctrlr;
	made->is_tcp = controller->is_tcp;
	made->depth = depth;
	made->ns = namespace_of(controller->ctrlr, nsid);
	made->flights = calloc(depth, sizeof(*made->flights));
	made->done = calloc(depth, sizeof(*made->done));
	spdk_nvme_ctrlr_get_default_io_qpair_opts(controller->ctrlr, &opts, sizeof(opts));
	/* A transfer larger than one command is several requests. */
	if (opts.io_queue_requests < depth * 16)
		opts.io_queue_requests = depth * 16;
	/* One doorbell for all that one poll submits. */
	opts.delay_cmd_submit = true;
	if (made->ns != NULL && made->flights != NULL && made->done != NULL)
		made->qpair = spdk_nvme_ctrlr_alloc_io_qpair(controller->ctrlr, &opts, sizeof(opts));
	if (made->qpair == NULL) {
		int rc = made->ns == NULL ? -ENODEV : -ENXIO;
		free(made->flights);
		free(made->done);
		free(made);
		return rc;
	}
	for (uint32_t i = 0; i < depth; i++) {
		made->flights[i].qpair = made;
		made->flights[i].next = i + 1 < depth ? &made->flights[i + 1] : NULL;
	}
	made->free = made->flights;
	*out = made;
	return 0;
}

/* The pair fails: what is under way is cut off and said to have failed. */
static void give_up(struct kvring_spdk_qpair *qpair)
{
	struct spdk_nvme_qpair *gone = qpair->qpair;

	qpair->qpair = NULL;
	if (gone != NULL)
		spdk_nvme_ctrlr_free_io_qpair(gone);
}

void kvring_spdk_qpair_free(struct kvring_spdk_qpair *qpair)
{
	give_up(qpair);
	free(qpair->flights);
	free(qpair->done);
	free(qpair);
}

static int32_t result_of(const struct spdk_nvme_cpl *cpl)
{
	if (!spdk_nvme_cpl_is_error(cpl))
		return 0;
	if (cpl->status.sct == SPDK_NVME_SCT_GENERIC) {
		switch (cpl->status.sc) {
		case SPDK_NVME_SC_INVALID_FIELD:
		case SPDK_NVME_SC_LBA_OUT_OF_RANGE:
			return -EINVAL;
		case SPDK_NVME_SC_INVALID_NAMESPACE_OR_FORMAT:
			return -ENODEV;
		case SPDK_NVME_SC_CAPACITY_EXCEEDED:
			return -ENOSPC;
		case SPDK_NVME_SC_ABORTED_SQ_DELETION:
		case SPDK_NVME_SC_ABORTED_BY_REQUEST:
			return -ECANCELED;
		}
	}
	return -EIO;
}

static void command_done(void *arg, const struct spdk_nvme_cpl *cpl)
{
	struct flight *flight = arg;
	struct kvring_spdk_qpair *qpair = flight->qpair;
	uint32_t at = (qpair->done_first + qpair->done_count) % qpair->depth;

	qpair->done[at].tag = flight->tag;
	qpair->done[at].result = result_of(cpl);
	qpair->done_count++;
	qpair->inflight--;
	flight->next = qpair->free;
	qpair->free = flight;
}

static struct flight *take_flight(struct kvring_spdk_qpair *qpair, uint64_t tag)
{
	struct flight *flight = qpair->free;

	/* Each flight ends as one word of `done`, which has room for no more than those. */
	if (flight == NULL || qpair->inflight + qpair->done_count == qpair->depth)
		return NULL;
	qpair->inflight++;
	flight->tag = tag;
	qpair->free = flight->next;
	return flight;
}

static int32_t begun(struct kvring_spdk_qpair *qpair, struct flight *flight, int rc)
{
	if (rc == 0)
		return 0;
	qpair->inflight--;
	flight->next = qpair->free;
	qpair->free = flight;
	return rc == -ENOMEM ? -EAGAIN : rc;
}

int32_t kvring_spdk_submit(struct kvring_spdk_qpair *qpair, int32_t write, void *memory, uint64_t sector,
			   uint32_t sectors, uint64_t tag)
{
	struct flight *flight;
	int rc;

	if (qpair->qpair == NULL || qpair->failed)
		return -ENXIO;
	flight = take_flight(qpair, tag);
	if (flight == NULL)
		return -EAGAIN;
	if (write)
		rc = spdk_nvme_ns_cmd_write(qpair->ns, qpair->qpair, memory, sector, sectors, command_done, flight, 0);
	else
		rc = spdk_nvme_ns_cmd_read(qpair->ns, qpair->qpair, memory, sector, sectors, command_done, flight, 0);
	return begun(qpair, flight, rc);
}

int32_t kvring_spdk_flush(struct kvring_spdk_qpair *qpair, uint64_t tag)
{
	struct flight *flight;

	if (qpair->qpair == NULL || qpair->failed)
		return -ENXIO;
	flight = take_flight(qpair, tag);
	if (flight == NULL)
		return -EAGAIN;
	return begun(qpair, flight, spdk_nvme_ns_cmd_flush(qpair->ns, qpair->qpair, command_done, flight));
}

int32_t kvring_spdk_poll(struct kvring_spdk_qpair *qpair, struct kvring_spdk_done *done, uint32_t max)
{
	uint32_t count = 0;

	/* Submissions wait for this call too (delay_cmd_submit). */
	if (qpair->qpair != NULL && spdk_nvme_qpair_process_completions(qpair->qpair, 0) < 0 && !qpair->failed) {
		qpair->failed = 1;
		/* A device that moves bytes by itself may go on: what it has begun is never said to be over. */
		if (qpair->is_tcp)
			give_up(qpair);
		return -ENXIO;
	}
	while (count < max && qpair->done_count > 0) {
		done[count++] = qpair->done[qpair->done_first];
		qpair->done_first = (qpair->done_first + 1) % qpair->depth;
		qpair->done_count--;
	}
	return (int32_t)count;
}
