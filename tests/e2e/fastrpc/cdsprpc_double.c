/* SPDX-License-Identifier: Apache-2.0
 *
 * cdsprpc_double.c: stands for a phone's libcdsprpc.so on this machine. It writes down the calls
 * ($CDSPRPC_LOG), and forwards them to dsp_process under qemu-hexagon ($CDSPRPC_DSP: the command).
 * $CDSPRPC_FAIL names what goes wrong: see `fails`.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#pragma GCC visibility push(default)
#include "remote.h"

enum { MAX_SHARED = 64, CONNECTION_RESET = 104 };

static struct {
  void *data;
  size_t bytes;
  int fd;
} shared[MAX_SHARED];

static int to_dsp = -1, from_dsp = -1;
static pid_t dsp;
static int is_unsigned;
static unsigned num_calls;

static int fails(const char *what) {
  const char *wanted = getenv("CDSPRPC_FAIL");
  return wanted != NULL && strcmp(wanted, what) == 0;
}

#define LOG(...)                                                              \
  do {                                                                        \
    FILE *log_file = fopen(getenv("CDSPRPC_LOG"), "a");                       \
    fprintf(log_file, __VA_ARGS__);                                           \
    fclose(log_file);                                                         \
  } while (0)

/* ---- Memory ---------------------------------------------------------------------------------- */

void *rpcmem_alloc(int heap, uint32_t flags, int bytes) {
  LOG("alloc heap=%d flags=%u bytes=%d\n", heap, flags, bytes);
  for (int i = 0; i < MAX_SHARED && !fails("memory"); i++) {
    if (shared[i].data != NULL) continue;
    int fd = memfd_create("rpcmem", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, bytes) != 0) return NULL;
    shared[i].fd = fd;
    shared[i].bytes = (size_t)bytes;
    shared[i].data = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return shared[i].data;
  }
  return NULL;
}

int rpcmem_to_fd(void *data) {
  for (int i = 0; i < MAX_SHARED; i++)
    if (data != NULL && shared[i].data == data) return shared[i].fd;
  return -1;
}

void rpcmem_free(void *data) {
  for (int i = 0; i < MAX_SHARED; i++) {
    if (data == NULL || shared[i].data != data) continue;
    LOG("free bytes=%zu\n", shared[i].bytes);
    munmap(data, shared[i].bytes);
    close(shared[i].fd);
    shared[i].data = NULL;
  }
}

int fastrpc_mmap(int domain, int fd, void *data, int offset, size_t bytes, int flags) {
  LOG("mmap domain=%d offset=%d bytes=%zu flags=%d known=%d\n", domain, offset, bytes, flags,
      rpcmem_to_fd(data) == fd);
  return fails("map") ? 0x66 : 0;
}

int fastrpc_munmap(int domain, int fd, void *data, size_t bytes) {
  LOG("munmap domain=%d bytes=%zu known=%d\n", domain, bytes, rpcmem_to_fd(data) == fd);
  return 0;
}

/* ---- Questions ------------------------------------------------------------------------------- */

int remote_handle_control(uint32_t request, void *data, uint32_t bytes) {
  uint32_t *question = data;
  LOG("control request=%u bytes=%u domain=%u attribute=%u\n", request, bytes, question[0],
      question[1]);
  if (fails("no-answer")) return 0x14;
  const char *version = getenv("CDSPRPC_VERSION");
  if (question[1] == 6) question[2] = 0x8c00 | (uint32_t)strtoul(version, NULL, 16);
  if (question[1] == 1) question[2] = !fails("no-unsigned");
  return 0;
}

int remote_session_control(uint32_t request, void *data, uint32_t bytes) {
  const int *values = data;
  if (request == 1) {
    LOG("session_control request=1 bytes=%u domain=%d priority=%d stack=%d\n", bytes, values[0],
        values[1], values[2]);
    return fails("stack") ? 0x14 : 0;
  }
  LOG("session_control request=%u bytes=%u domain=%d enable=%d\n", request, bytes, values[0],
      values[1]);
  if (fails("unsigned")) return 0x15;
  is_unsigned = request == 2 && values[0] == 3 && values[1] == 1;
  return 0;
}

/* ---- Calls ----------------------------------------------------------------------------------- */

static int transfer(int file, void *data, size_t bytes, int is_write) {
  for (char *at = data; bytes > 0;) {
    ssize_t done = is_write ? write(file, at, bytes) : read(file, at, bytes);
    if (done <= 0) return CONNECTION_RESET;
    at += done, bytes -= (size_t)done;
  }
  return 0;
}

static int forward(uint64_t handle, uint32_t scalars, remote_argument *arguments) {
  uint32_t in = remote_num_in(scalars), buffers = in + remote_num_out(scalars);
  uint32_t handles_in = scalars >> 4 & 15, handles_out = scalars & 15;
  int failed = transfer(to_dsp, &handle, sizeof handle, 1);
  failed = failed ? failed : transfer(to_dsp, &scalars, sizeof scalars, 1);
  for (uint32_t i = 0; i < buffers && !failed; i++) {
    uint32_t bytes = (uint32_t)arguments[i].buffer.bytes;
    failed = transfer(to_dsp, &bytes, sizeof bytes, 1);
    if (i < in && !failed) failed = transfer(to_dsp, arguments[i].buffer.data, bytes, 1);
  }
  for (uint32_t i = 0; i < handles_in && !failed; i++)
    failed = transfer(to_dsp, &arguments[buffers + i].handle, sizeof handle, 1);
  int32_t code = 0;
  failed = failed ? failed : transfer(from_dsp, &code, sizeof code, 0);
  for (uint32_t i = in; i < buffers && !failed; i++)
    failed = transfer(from_dsp, arguments[i].buffer.data, arguments[i].buffer.bytes, 0);
  for (uint32_t i = 0; i < handles_out && !failed; i++)
    failed = transfer(from_dsp, &arguments[buffers + handles_in + i].handle, sizeof handle, 0);
  return failed ? failed : code;
}

/* Starts the DSP's process; the library is looked for as a phone does, in ADSP_LIBRARY_PATH. */
static int start(const char *name) {
  char path[1024], pid[16];
  const char *folders = getenv("ADSP_LIBRARY_PATH");
  snprintf(path, sizeof path, "%.*s/%s", (int)strcspn(folders, ";"), folders, name);
  if (access(path, R_OK) != 0) return (int)0x80000406;
  snprintf(pid, sizeof pid, "%d", (int)getpid());
  int there[2], back[2];
  if (pipe2(there, O_CLOEXEC) != 0 || pipe2(back, O_CLOEXEC) != 0) return 1;
  signal(SIGPIPE, SIG_IGN);
  dsp = fork();
  if (dsp == 0) {
    dup2(there[0], 0);
    dup2(back[1], 1);
    execlp("qemu-hexagon", "qemu-hexagon", "-cpu", "v67", getenv("CDSPRPC_DSP"), path, pid, NULL);
    _exit(127);
  }
  close(there[0]);
  close(back[1]);
  to_dsp = there[1];
  from_dsp = back[0];
  return 0;
}

int remote_handle64_open(const char *uri, uint64_t *handle) {
  char name[128] = "";
  LOG("open unsigned=%d uri=%s path=%s\n", is_unsigned, uri, getenv("ADSP_LIBRARY_PATH"));
  if (fails("signature")) return (int)0x80000481;
  sscanf(uri, "file:///%127[^?]", name);
  int code = start(name);
  if (code != 0) return code;
  uint32_t length = (uint32_t)strlen(uri) + 1;
  remote_argument arguments[3] = {{.buffer = {&length, sizeof length}},
                                  {.buffer = {(void *)(uintptr_t)uri, length}}};
  code = forward(0, remote_scalars(0, 2, 0, 0, 1), arguments);
  *handle = arguments[2].handle;
  return code;
}

int remote_handle64_invoke(uint64_t handle, uint32_t scalars, remote_argument *arguments) {
  LOG("invoke method=%u in=%u out=%u sizes=%zu,%zu,%zu,%zu\n", remote_method(scalars),
      remote_num_in(scalars), remote_num_out(scalars), arguments[0].buffer.bytes,
      arguments[1].buffer.bytes, arguments[2].buffer.bytes, arguments[3].buffer.bytes);
  if (fails("crash") && remote_method(scalars) == 6 && ++num_calls == 3) kill(dsp, SIGKILL);
  if (!fails("stale") || remote_method(scalars) != 4) return forward(handle, scalars, arguments);
  char first = *(char *)shared[0].data;
  *(char *)shared[0].data = 0; /* the DSP sees what lay there before */
  int code = forward(handle, scalars, arguments);
  *(char *)shared[0].data = first;
  return code;
}

int remote_handle64_close(uint64_t handle) {
  remote_argument argument = {.handle = handle};
  LOG("close\n");
  int code = forward(0, remote_scalars(1, 0, 0, 1, 0), &argument);
  close(to_dsp);
  close(from_dsp);
  waitpid(dsp, NULL, 0);
  return code;
}
