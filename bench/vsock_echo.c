/* vsock_echo PORT: sends back what comes on a vsock port, one connection after the other. The ceiling for an exec's streams. */

#include <linux/vm_sockets.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    static char buffer[1 << 16];
    struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);

    if (argc != 2 || listener < 0)
        return 2;
    address.svm_port = (unsigned)atoi(argv[1]);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4))
        return 1;
    for (;;) {
        int connection = accept(listener, 0, 0);
        ssize_t count;

        while ((count = read(connection, buffer, sizeof buffer)) > 0)
            for (ssize_t at = 0, sent; at < count; at += sent)
                if ((sent = write(connection, buffer + at, (size_t)(count - at))) <= 0)
                    return 1;
        close(connection);
    }
}
