/* Lets file operations below one directory fail on purpose; loaded into every process by LD_PRELOAD. See faults.py.

   Each operation that changes a file is a point, numbered through all processes. At one chosen point the process is
   killed before the operation (a write is torn: half of it is done), or the disk is full from there on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, LIST, KILL, FULL };
enum { GO, FAIL, TEAR };

/* Mirrored by faults.Control in faults.py. */
struct control {
    long mode, at, count, full, every_write;
    char root[2048], log[2048];
};
static struct control *shared;
static char written[65536]; /* descriptors written to since they were opened, in this process */

__attribute__((constructor)) static void attach(void) {
    const char *path = getenv("ECLIPSE_FAULTS");
    int fd = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *memory = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (memory != MAP_FAILED) shared = memory;
}

static void note(const char *kind, const char *path) {
    char line[5000];
    int size = snprintf(line, sizeof line, "%s\t%s\n", kind, path + strlen(shared->root));
    int fd = syscall(SYS_openat, AT_FDCWD, shared->log, O_WRONLY | O_APPEND | O_CREAT, 0644);
    if (fd >= 0) { syscall(SYS_write, fd, line, size); syscall(SYS_close, fd); }
}

static int consumes(const char *kind) { return !strcmp(kind, "write") || !strcmp(kind, "create") || !strcmp(kind, "mkdir") || !strcmp(kind, "fsync"); }

/* What is to become of this operation: GO on, FAIL with errno set, or TEAR a write and die. */
static int point(const char *kind, const char *path) {
    if (!shared || shared->mode == OFF || !path) return GO;
    size_t size = strlen(shared->root);
    if (!size || strncmp(path, shared->root, size)) return GO;
    if (shared->full) { if (!consumes(kind)) return GO; errno = ENOSPC; return FAIL; }
    long number = __sync_add_and_fetch(&shared->count, 1);
    if (shared->mode == LIST) note(kind, path);
    if (number != shared->at) return GO;
    note(kind, path);
    if (shared->mode == KILL) {
        if (!strcmp(kind, "write")) return TEAR;
        syscall(SYS_kill, getpid(), SIGKILL);
    }
    if (shared->mode == FULL) {
        shared->full = 1;
        if (consumes(kind)) { errno = ENOSPC; return FAIL; }
    }
    return GO;
}

static const char *of_fd(int fd, char *room, size_t size) {
    if (!shared || shared->mode == OFF) return NULL;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, room, size - 1);
    if (length < 0) return NULL;
    room[length] = 0;
    return room;
}

static const char *of_path(int dir, const char *path, char *room, size_t size) {
    if (!shared || shared->mode == OFF || !path) return NULL;
    if (path[0] == '/') return path;
    char base[2048];
    if (dir == AT_FDCWD) { if (!getcwd(base, sizeof base)) return NULL; }
    else if (!of_fd(dir, base, sizeof base)) return NULL;
    snprintf(room, size, "%s/%s", base, path);
    return room;
}

static int write_point(int fd) {
    char room[4096];
    if (!shared || shared->mode == OFF) return GO;
    if (fd >= 0 && fd < (int)sizeof written && !shared->every_write && !shared->full) {
        if (written[fd]) return GO;
        written[fd] = 1;
    }
    return point("write", of_fd(fd, room, sizeof room));
}

static void die(void) { syscall(SYS_kill, getpid(), SIGKILL); }

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define TORN(half) do { int what = write_point(fd); if (what == FAIL) return -1; if (what == TEAR) { half; die(); } } while (0)

ssize_t write(int fd, const void *data, size_t n) { REAL(write); TORN(real(fd, data, n / 2)); return real(fd, data, n); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t o) { REAL(pwrite); TORN(real(fd, data, n / 2, o)); return real(fd, data, n, o); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t o) { REAL(pwrite64); TORN(real(fd, data, n / 2, o)); return real(fd, data, n, o); }
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(writev); TORN(real(fd, v, n / 2)); return real(fd, v, n); }
ssize_t copy_file_range(int from, off64_t *a, int fd, off64_t *b, size_t n, unsigned f) { REAL(copy_file_range); TORN(real(from, a, fd, b, n / 2, f)); return real(from, a, fd, b, n, f); }
ssize_t sendfile(int fd, int from, off_t *a, size_t n) { ssize_t (*real)(int, int, off_t *, size_t) = dlsym(RTLD_NEXT, "sendfile"); TORN(real(fd, from, a, n / 2)); return real(fd, from, a, n); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); TORN((void)0); return real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); TORN((void)0); return real(fd, n); }
int posix_fallocate(int fd, off_t o, off_t n) { REAL(posix_fallocate); int what = write_point(fd); if (what == FAIL) return ENOSPC; if (what == TEAR) die(); return real(fd, o, n); }

#define SYNC(name) int name(int fd) { char room[4096]; REAL(name); if (point("fsync", of_fd(fd, room, sizeof room)) == FAIL) return -1; return real(fd); }
SYNC(fsync)
SYNC(fdatasync)

static int opened(int fd) { if (fd >= 0 && fd < (int)sizeof written) written[fd] = 0; return fd; }
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define CREATES(dir) if ((flags & O_CREAT) && point("create", of_path(dir, path, room, sizeof room)) == FAIL) return -1
#define OPEN(name) int name(const char *path, int flags, ...) { char room[4096]; MODE REAL(name); CREATES(AT_FDCWD); return opened(real(path, flags, mode)); }
#define OPENAT(name) int name(int dir, const char *path, int flags, ...) { char room[4096]; MODE REAL(name); CREATES(dir); return opened(real(dir, path, flags, mode)); }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name) FILE *name(const char *path, const char *how) { char room[4096]; REAL(name); if (strpbrk(how, "wa") && point("create", of_path(AT_FDCWD, path, room, sizeof room)) == FAIL) return NULL; return real(path, how); }
FOPEN(fopen)
FOPEN(fopen64)

#define AT(kind, dir, path) char room[4096]; if (point(kind, of_path(dir, path, room, sizeof room)) == FAIL) return -1
int rename(const char *a, const char *b) { REAL(rename); AT("rename", AT_FDCWD, b); return real(a, b); }
int renameat(int da, const char *a, int db, const char *b) { REAL(renameat); AT("rename", db, b); return real(da, a, db, b); }
static int there(int dir, const char *path) { struct stat found; return !fstatat(dir, path, &found, AT_SYMLINK_NOFOLLOW); } /* else nothing would be changed */
int unlink(const char *path) { REAL(unlink); if (!there(AT_FDCWD, path)) return real(path); AT("unlink", AT_FDCWD, path); return real(path); }
int unlinkat(int dir, const char *path, int flags) { REAL(unlinkat); AT("unlink", dir, path); return real(dir, path, flags); }
int rmdir(const char *path) { REAL(rmdir); AT("rmdir", AT_FDCWD, path); return real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); if (there(AT_FDCWD, path)) return real(path, mode); AT("mkdir", AT_FDCWD, path); return real(path, mode); }
int mkdirat(int dir, const char *path, mode_t mode) { REAL(mkdirat); if (there(dir, path)) return real(dir, path, mode); AT("mkdir", dir, path); return real(dir, path, mode); }
int symlink(const char *to, const char *path) { REAL(symlink); AT("create", AT_FDCWD, path); return real(to, path); }
int symlinkat(const char *to, int dir, const char *path) { REAL(symlinkat); AT("create", dir, path); return real(to, dir, path); }
int link(const char *a, const char *b) { REAL(link); AT("create", AT_FDCWD, b); return real(a, b); }
