/* DNS that does not answer: loaded in front of libc, it lets look-ups of names under .unresolvable hang for minutes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    static int (*right)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    if (!right) right = (int (*)(const char *, const char *, const struct addrinfo *, struct addrinfo **))dlsym(RTLD_NEXT, "getaddrinfo");
    const char *end = node ? strstr(node, ".unresolvable") : 0;
    if (end) {
        sleep(300);
        return EAI_AGAIN;
    }
    return right(node, service, hints, found);
}
